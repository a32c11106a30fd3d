// Shows a node's results once they are there: ComfyUI's front end prefers a node's live previews to
// its outputs, and keeps the last preview until the node runs again.
import { app } from "../../scripts/app.js";

// Previews are kept twice: by the app, for the canvas, and by a store, for Nodes 2.0.
function previewsOf() {
  const pinia = document.getElementById("vue-app")?.__vue_app__?.config.globalProperties.$pinia;
  return [app.nodePreviewImages, pinia?._s.get("nodeOutput")?.nodePreviewImages];
}

function dropPreviews(node) {
  const inSubgraph = node.graph && node.graph !== app.graph?.rootGraph && !node.graph.isRootGraph;
  const key = inSubgraph ? `${node.graph.id}:${node.id}` : `${node.id}`;
  for (const previews of previewsOf()) {
    for (const url of previews?.[key] ?? []) URL.revokeObjectURL(url);
    if (previews) delete previews[key];
  }
}

app.registerExtension({
  name: "cntlora.results",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("CNTLoRA")) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      dropPreviews(this);
      return before?.call(this, output);
    };
  },
});
