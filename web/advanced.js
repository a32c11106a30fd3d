// Hides widgets that are marked as advanced until "Show Advanced" is chosen in the node's menu, and
// for good those that are marked as hidden. ComfyUI's front end of v0.8.0 has that menu, but does
// not hand the marks on to the widgets.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "cntlora.advanced",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("CNTLoRA")) return;
    for (const widget of node.widgets ?? []) {
      if (widget.options?.advanced) widget.advanced = true;
      if (widget.options?.hidden) widget.hidden = true;
    }
    node.setSize([node.size[0], node.computeSize()[1]]);
  },
});
