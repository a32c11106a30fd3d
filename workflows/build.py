"""Writes the workflows, each in the layout of ComfyUI's canvas and in that of its API.

    python workflows/build.py OBJECT_INFO

``OBJECT_INFO`` is a file with what a running ComfyUI with this pack answers under
``/object_info``. The graphs stand here once; ``NAME.json`` opens by drag and drop and in the
template browser, ``api/NAME.json`` can be posted to ``/prompt``.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SMALL = "small model (built in, 64 px)"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
LINE_HEIGHT, HEAD = 26, 60


@dataclass(frozen=True)
class Link:
    """An output of another node."""

    node: Node
    output: int


@dataclass(eq=False)
class Node:
    """A node of a graph: what is not given takes its default.

    Attributes:
        kind: The node's id in ComfyUI.
        at: Column and height on the canvas, in pixels.
        given: Links and widget values by input.
        title: Over the node, where it is not the usual one.
        tall: Height on the canvas, in pixels; by default as its widgets need.
        wide: Width on the canvas, in pixels.
        number: Its number in the graph.
    """

    kind: str
    at: tuple[int, int]
    given: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    tall: int = 0
    wide: int = 330
    number: int = 0

    def out(self, output: int = 0) -> Link:
        return Link(self, output)


class Graph:
    """Nodes in the order in which they run."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, kind: str, at: tuple[int, int], *, title: str | None = None, tall: int = 0,
            wide: int = 330, **given: Any) -> Node:  # fmt: skip
        node = Node(kind, at, given, title, tall, wide, len(self.nodes) + 1)
        self.nodes.append(node)
        return node

    def note(self, at: tuple[int, int], text: str, tall: int = 160) -> None:
        self.add("MarkdownNote", at, tall=tall, text=text)


def inputs_of(info: Mapping[str, Any], kind: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Type and options of each input of a node, in its order."""
    groups = info[kind]["input"]
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for group in ("required", "optional"):
        for name, entry in groups.get(group, {}).items():
            found[name] = (entry[0], entry[1] if len(entry) > 1 else {})
    return found


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in WIDGETS


def widget_values(info: Mapping[str, Any], node: Node) -> dict[str, Any]:
    """The value of each widget of a node, in its order."""
    values = {}
    for name, (kind, options) in inputs_of(info, node.kind).items():
        if not is_widget(kind):
            continue
        choices = kind if isinstance(kind, list) else options.get("options", [None])
        default = options.get("default", choices[0] if choices else None)
        given = node.given.get(name, default)
        values[name] = default if isinstance(given, Link) else given
    return values


def api_layout(graph: Graph, info: Mapping[str, Any]) -> dict[str, Any]:
    """What ``/prompt`` takes."""
    prompt = {}
    for node in graph.nodes:
        if node.kind not in info:  # a note
            continue
        unknown = set(node.given) - set(inputs_of(info, node.kind))
        if unknown:
            raise ValueError(f"{node.kind} has no input {sorted(unknown)}")
        inputs: dict[str, Any] = {
            k: v for k, v in widget_values(info, node).items() if v is not None
        }
        for name, value in node.given.items():
            if isinstance(value, Link):
                inputs[name] = [str(value.node.number), value.output]
        prompt[str(node.number)] = {
            "class_type": node.kind,
            "inputs": inputs,
            "_meta": {"title": node.title or info[node.kind]["display_name"]},
        }
    return prompt


def canvas_layout(name: str, graph: Graph, info: Mapping[str, Any]) -> dict[str, Any]:
    """What the canvas opens."""
    links: list[list[Any]] = []
    leaving: dict[tuple[int, int], list[int]] = {}
    entering: dict[tuple[int, str], int] = {}
    for node in graph.nodes:
        sockets = [] if node.kind not in info else _sockets(info, node)
        for slot, (input_name, kind) in enumerate(sockets):
            link = node.given.get(input_name)
            if isinstance(link, Link):
                number = len(links) + 1
                links.append([number, link.node.number, link.output, node.number, slot, kind])
                leaving.setdefault((link.node.number, link.output), []).append(number)
                entering[node.number, input_name] = number
    nodes = [_canvas_node(node, info, leaving, entering) for node in graph.nodes]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cntlora/{name}")),
        "revision": 0,
        "last_node_id": len(graph.nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _sockets(info: Mapping[str, Any], node: Node) -> list[tuple[str, str]]:
    """Inputs that are no widgets, and after them the widgets that a link replaces."""
    found = inputs_of(info, node.kind).items()
    plain = [(name, kind) for name, (kind, _) in found if not is_widget(kind)]
    linked = [
        (name, kind)
        for name, (kind, _) in found
        if is_widget(kind) and isinstance(node.given.get(name), Link)
    ]
    return [*plain, *linked]


def _canvas_node(
    node: Node,
    info: Mapping[str, Any],
    leaving: Mapping[tuple[int, int], list[int]],
    entering: Mapping[tuple[int, str], int],
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "id": node.number,
        "type": node.kind,
        "pos": list(node.at),
        "flags": {},
        "order": node.number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
    }
    if node.title:
        content["title"] = node.title
    if node.kind not in info:
        content |= {"size": [node.wide, node.tall], "widgets_values": [node.given["text"]]}
        return content
    known = info[node.kind]
    shown, values = 0, []
    for name, value in widget_values(info, node).items():
        kind, options = inputs_of(info, node.kind)[name]
        values.append(value)
        unseen = options.get("advanced") or options.get("hidden")
        shown += 0 if unseen else 4 if options.get("multiline") else 1
        fixed = options.get("control_after_generate", name in ("seed", "noise_seed"))
        if kind == "INT" and fixed:
            values.append("fixed")
            shown += 1
    sockets = _sockets(info, node)
    rows = max(len(sockets), len(known["output"])) + shown
    outputs = zip(known["output_name"], known["output"])
    return content | {
        "size": [node.wide, node.tall or HEAD + LINE_HEIGHT * rows],
        "inputs": [
            {
                "name": name,
                "type": kind,
                "link": entering.get((node.number, name)),
                **({"widget": {"name": name}} if is_widget(kind) else {}),
            }
            for name, kind in sockets
        ],
        "outputs": [
            {"name": name, "type": kind, "links": leaving.get((node.number, slot), [])}
            for slot, (name, kind) in enumerate(outputs)
        ],
        "properties": {"Node name for S&R": node.kind},
        "widgets_values": values,
    }


def small_model() -> Graph:
    graph = Graph()
    model = graph.add("CNTLoRALoadModel", (40, 40), checkpoint=SMALL)
    subject = graph.add(
        "CNTLoRASubject", (40, 200), folder="example/penguin", class_name="penguin", tall=480
    )
    others = graph.add(
        "CNTLoRAClassImages", (420, 40), model=model.out(), subject=subject.out(), count=50,
        guidance=2.5, tall=480,
    )  # fmt: skip
    initialized = graph.add(
        "CNTLoRAInitialize", (420, 560), model=model.out(), subject=subject.out(), rank=16,
        passes=8, tall=400,
    )  # fmt: skip
    lora = graph.add(
        "CNTLoRATrain", (800, 40), start=initialized.out(), class_images=others.out(), steps=150,
        learning_rate=1e-3, lr_schedule="cosine", preview_every=50, tall=830,
    )  # fmt: skip
    graph.add("CNTLoRASave", (1180, 40), lora=lora.out(), filename_prefix="small_penguin")
    prompts = "a photo of sks penguin\na photo of sks penguin on the beach"
    graph.add(
        "CNTLoRACompare", (1180, 220), model=model.out(), lora_1=lora.out(), prompts=prompts,
        seeds="0, 1, 2", guidance=2.5, tall=720, wide=520,
    )  # fmt: skip
    generated = graph.add(
        "CNTLoRASample", (800, 910), model=model.out(), lora=lora.out(), prompts=prompts,
        per_prompt=4, guidance=2.5, tall=640,
    )  # fmt: skip
    graph.add(
        "CNTLoRAEvaluate", (1180, 980), images=generated.out(), subject=subject.out(),
        prompts=generated.out(1), tall=600, wide=520,
    )  # fmt: skip
    graph.note(
        (40, 740),
        "**Teach the small model a penguin.** Press Run: it takes some minutes on a CPU. Above the "
        "training you see the loss and preview pictures; the grid on the right shows the model "
        "without the LoRA and with it, and below it eight pictures are measured.\n\nThen load "
        "*personalise_sd15* for photos of your own.",
    )
    return graph


def sd15() -> Graph:
    graph = Graph()
    model = graph.add("CNTLoRALoadModel", (40, 40), checkpoint=CHECKPOINT)
    subject = graph.add(
        "CNTLoRASubject", (40, 200), folder="example/backpack", class_name="backpack", tall=480
    )
    others = graph.add(
        "CNTLoRAClassImages", (420, 40), model=model.out(), subject=subject.out(), tall=480
    )
    initialized = graph.add(
        "CNTLoRAInitialize", (420, 560), model=model.out(), subject=subject.out(), tall=400
    )
    lora = graph.add(
        "CNTLoRATrain", (800, 40), start=initialized.out(), class_images=others.out(), tall=830
    )
    graph.add("CNTLoRASave", (1180, 40), lora=lora.out())
    graph.add("LossGraphNode", (1180, 220), loss=lora.out(1))
    loaded = graph.add("CNTLoRAOpenModel", (800, 910), model=model.out())
    applied = graph.add(
        "CNTLoRAApply", (1180, 620), model=loaded.out(), clip=loaded.out(1), lora=lora.out()
    )
    prompt = graph.add(
        "StringConcatenate", (1180, 830), string_a=subject.out(2), string_b="in the snow",
        delimiter=" ", title="Your subject ...",
    )  # fmt: skip
    _generate(graph, (1560, 40), applied, loaded, prompt.out())
    graph.note(
        (40, 740),
        "**Teach Stable Diffusion 1.5 your subject.**\n\n1. Put 4 to 6 photos into a folder in "
        "ComfyUI's `input` and choose it under *folder* (or connect images).\n2. Say what it is "
        "under *class_name*.\n3. Run. Cancel whenever you like: the next run goes on.\n\nThe "
        "picture is of your subject *in the snow*: write something else below *Your subject ...*.",
        tall=260,
    )
    return graph


def compare_initializations() -> Graph:
    graph = Graph()
    model = graph.add("CNTLoRALoadModel", (40, 40), checkpoint=SMALL)
    subject = graph.add(
        "CNTLoRASubject", (40, 200), folder="example/clock", class_name="clock", tall=480
    )
    others = graph.add(
        "CNTLoRAClassImages", (420, 40), model=model.out(), subject=subject.out(), count=50,
        guidance=2.5, tall=480,
    )  # fmt: skip
    loras = []
    for i, method in enumerate(("lora", "self", "cross")):
        y = 40 + i * 870
        initialized = graph.add(
            "CNTLoRAInitialize", (800, y), model=model.out(), subject=subject.out(), method=method,
            rank=16, passes=8, title=f"Initialise: {method}", tall=400,
        )  # fmt: skip
        lora = graph.add(
            "CNTLoRATrain", (1180, y), start=initialized.out(), class_images=others.out(),
            steps=150, learning_rate=1e-3, lr_schedule="cosine", preview_every=0,
            title=f"Teach: {method}", tall=830,
        )  # fmt: skip
        loras.append(lora.out())
    prompts = "a photo of sks clock\na photo of sks clock on the grass"
    graph.add(
        "CNTLoRACompare", (1560, 40), model=model.out(), prompts=prompts, seeds="0, 1, 2",
        guidance=2.5, tall=800, wide=620, **{f"lora_{i}": x for i, x in enumerate(loras, 1)},
    )  # fmt: skip
    graph.note(
        (40, 740),
        "**One subject, three initialisations.** The same steps and seeds: an ordinary LoRA, and "
        "two that are initialised from the photos. With a checkpoint of SD1.5 in the first node, "
        "set *rank* to 128, *guidance* to 7.5, *steps* to 1000 and *learning_rate* to 0.0001.",
    )
    return graph


def use_saved() -> Graph:
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", (40, 40), ckpt_name=CHECKPOINT)
    name = "my_subject_00001_.safetensors"
    lora = graph.add(
        "LoraLoader", (420, 40), model=loaded.out(), clip=loaded.out(1), lora_name=name
    )
    _generate(graph, (800, 40), lora, loaded, "a photo of sks backpack in the snow")
    graph.add("CNTLoRAInspect", (40, 260), lora_name=name, tall=340, wide=640)
    graph.note(
        (40, 640),
        "**Use a LoRA that was saved.** Choose it in both nodes, press R first if it is not in the "
        "list. *Inspect LoRA* shows its trigger word and how it was trained.",
    )
    return graph


def _generate(
    graph: Graph, at: tuple[int, int], lora: Node, loaded: Node, prompt: str | Link
) -> None:
    x, y = at
    wanted = graph.add("CLIPTextEncode", (x, y), clip=lora.out(1), text=prompt, title="Prompt")
    unwanted = graph.add(
        "CLIPTextEncode", (x, y + 240), clip=lora.out(1), text="", title="Negative prompt"
    )
    empty = graph.add("EmptyLatentImage", (x, y + 480), width=512, height=512)
    generated = graph.add(
        "KSampler", (x + 380, y), model=lora.out(), positive=wanted.out(), negative=unwanted.out(),
        latent_image=empty.out(), seed=0, steps=25, cfg=7.5, sampler_name="dpmpp_2m",
        scheduler="karras",
    )  # fmt: skip
    picture = graph.add("VAEDecode", (x + 380, y + 440), samples=generated.out(), vae=loaded.out(2))
    graph.add("SaveImage", (x + 760, y), images=picture.out(), filename_prefix="cntlora", tall=420)


GRAPHS = {
    "personalise_small_model": small_model,
    "personalise_sd15": sd15,
    "compare_initializations": compare_initializations,
    "use_a_saved_lora": use_saved,
}


def main(arguments: Sequence[str]) -> None:
    info = json.loads(Path(arguments[0]).read_text("utf-8"))
    for name, build in GRAPHS.items():
        graph = build()
        for path, content in (
            (HERE / f"{name}.json", canvas_layout(name, graph, info)),
            (HERE / "api" / f"{name}.json", api_layout(graph, info)),
        ):
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
