"""Writes the workflows, each in the layout of ComfyUI's canvas and in that of its API.

    python workflows/build.py OBJECT_INFO

``OBJECT_INFO`` is a file with what a running ComfyUI with this pack answers under
``/object_info``. The graphs stand here once; ``NAME.json`` opens by drag and drop and in the
template browser, ``api/NAME.json`` can be posted to ``/prompt``. ``../subgraphs`` gets what ComfyUI
offers as a node.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphs import Graph, Link, Subgraph
from layouts import api_layout, blueprint, canvas_layout

HERE = Path(__file__).parent
SMALL = "small model (built in, 64 px)"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


def small_model() -> Graph:
    graph = Graph()
    model = graph.add("CNTLoRALoadModel", (40, 40), checkpoint=SMALL)
    subject = graph.add(
        "CNTLoRASubject", (40, 200), folder="example/penguin", class_name="penguin", tall=550
    )
    others = graph.add(
        "CNTLoRAClassImages", (420, 40), model=model.out(), subject=subject.out(), count=50,
        guidance=2.5, tall=480,
    )  # fmt: skip
    initialized = graph.add(
        "CNTLoRAInitialize", (420, 560), model=model.out(), subject=subject.out(), tall=400
    )
    lora = graph.add(
        "CNTLoRATrain", (800, 40), start=initialized.out(), class_images=others.out(), tall=1000
    )
    graph.add("CNTLoRASave", (1180, 40), lora=lora.out(), filename_prefix="small_penguin")
    prompts = "a photo of sks penguin\na photo of sks penguin on the beach"
    graph.add(
        "CNTLoRACompare", (1180, 220), model=model.out(), lora_1=lora.out(), prompts=prompts,
        seeds="0, 1, 2", guidance=2.5, tall=720, wide=520,
    )  # fmt: skip
    generated = graph.add(
        "CNTLoRASample", (800, 1080), model=model.out(), lora=lora.out(), prompts=prompts,
        per_prompt=4, guidance=2.5, tall=640,
    )  # fmt: skip
    graph.add(
        "CNTLoRAEvaluate", (1180, 980), images=generated.out(), subject=subject.out(),
        prompts=generated.out(1), tall=600, wide=520,
    )  # fmt: skip
    graph.note(
        (40, 810),
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
        "CNTLoRASubject", (40, 200), folder="example/backpack", class_name="backpack", tall=550
    )
    others = graph.add(
        "CNTLoRAClassImages", (420, 40), model=model.out(), subject=subject.out(), tall=480
    )
    initialized = graph.add(
        "CNTLoRAInitialize", (420, 560), model=model.out(), subject=subject.out(), tall=400
    )
    lora = graph.add(
        "CNTLoRATrain", (800, 40), start=initialized.out(), class_images=others.out(), tall=1000
    )
    graph.add("CNTLoRASave", (1180, 40), lora=lora.out())
    graph.add("LossGraphNode", (1180, 220), loss=lora.out(1))
    loaded = graph.add("CNTLoRAOpenModel", (800, 1080), model=model.out())
    applied = graph.add(
        "CNTLoRAApply", (1180, 620), model=loaded.out(), clip=loaded.out(1), lora=lora.out()
    )
    prompt = graph.add(
        "StringConcatenate", (1180, 830), string_a=subject.out(2), string_b="in the snow",
        delimiter=" ", title="Your subject ...",
    )  # fmt: skip
    _generate(graph, (1560, 40), applied.out(), applied.out(1), loaded.out(2), prompt.out())
    graph.note(
        (40, 810),
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
        "CNTLoRASubject", (40, 200), folder="example/clock", class_name="clock", tall=550
    )
    others = graph.add(
        "CNTLoRAClassImages", (420, 40), model=model.out(), subject=subject.out(), count=50,
        guidance=2.5, tall=480,
    )  # fmt: skip
    loras = []
    for i, method in enumerate(("lora", "self", "cross")):
        y = 40 + i * 1040
        initialized = graph.add(
            "CNTLoRAInitialize", (800, y), model=model.out(), subject=subject.out(), method=method,
            title=f"Initialise: {method}", tall=400,
        )  # fmt: skip
        lora = graph.add(
            "CNTLoRATrain", (1180, y), start=initialized.out(), class_images=others.out(),
            preview_every=0, title=f"Teach: {method}", tall=1000,
        )  # fmt: skip
        loras.append(lora.out())
    prompts = "a photo of sks clock\na photo of sks clock on the grass"
    graph.add(
        "CNTLoRACompare", (1560, 40), model=model.out(), prompts=prompts, seeds="0, 1, 2",
        guidance=2.5, tall=800, wide=620, **{f"lora_{i}": x for i, x in enumerate(loras, 1)},
    )  # fmt: skip
    graph.note(
        (40, 810),
        "**One subject, three initialisations.** The same steps and seeds: an ordinary LoRA, and "
        "two that are initialised from the photos. With a checkpoint of SD1.5 in the first node, "
        "set *guidance* to 7.5; the paper's settings are *rank* 128, *steps* 1000, "
        "*learning_rate* 0.0001 and *lr_schedule* constant.",
    )
    return graph


def use_saved() -> Graph:
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", (40, 40), ckpt_name=CHECKPOINT)
    name = "my_subject_00001_.safetensors"
    lora = graph.add(
        "LoraLoader", (420, 40), model=loaded.out(), clip=loaded.out(1), lora_name=name
    )
    prompt = "a photo of sks backpack in the snow"
    _generate(graph, (800, 40), lora.out(), lora.out(1), loaded.out(2), prompt)
    graph.add("CNTLoRAInspect", (40, 260), lora_name=name, tall=340, wide=640)
    graph.note(
        (40, 640),
        "**Use a LoRA that was saved.** Choose it in both nodes, press R first if it is not in the "
        "list. *Inspect LoRA* shows its trigger word and how it was trained.",
    )
    return graph


def subject_lora(key: str, folder: str, class_name: str) -> Subgraph:
    """Photos and class in; LoRA, MODEL and CLIP out."""
    graph = Subgraph("Subject LoRA", key)
    model = graph.add("CNTLoRALoadModel", (40, 40), checkpoint=CHECKPOINT)
    subject = graph.add("CNTLoRASubject", (40, 200), folder=folder, class_name=class_name, tall=550)
    others = graph.add(
        "CNTLoRAClassImages", (420, 40), model=model.out(), subject=subject.out(), tall=480
    )
    initialized = graph.add(
        "CNTLoRAInitialize", (420, 560), model=model.out(), subject=subject.out(), tall=400
    )
    lora = graph.add(
        "CNTLoRATrain", (800, 40), start=initialized.out(), class_images=others.out(), tall=1000
    )
    opened = graph.add("CNTLoRAOpenModel", (800, 1080), model=model.out())
    applied = graph.add(
        "CNTLoRAApply", (1180, 40), model=opened.out(), clip=opened.out(1), lora=lora.out()
    )
    graph.entry(subject, "images")
    graph.entry(model, "checkpoint")
    for name in ("folder", "token", "class_name"):
        graph.entry(subject, name)
    graph.entry(lora, "steps")
    for name, link in (
        ("lora", lora.out()),
        ("MODEL", applied.out()),
        ("CLIP", applied.out(1)),
        ("VAE", opened.out(2)),
        ("prompt", subject.out(2)),
        ("previews", lora.out(4)),
    ):
        graph.exit(name, link)
    return graph


def first_run() -> Graph:
    graph = Graph()
    inside = subject_lora("subject_lora_sd15", "example/backpack", "backpack")
    subject = graph.add_subgraph(inside, (40, 40), tall=260)
    graph.add("CNTLoRASave", (40, 360), lora=subject.out())
    graph.add("PreviewImage", (40, 500), images=subject.out(5), title="Previews", tall=280)
    prompt = graph.add(
        "StringConcatenate", (420, 40), string_a=subject.out(4), string_b="in the snow",
        delimiter=" ", title="Your subject ...", tall=300,
    )  # fmt: skip
    _generate(graph, (800, 40), subject.out(1), subject.out(2), subject.out(3), prompt.out())
    graph.note(
        (420, 400),
        "**Your first LoRA, in one node.**\n\n1. Choose a *checkpoint* of Stable Diffusion 1.5: it "
        "is trained on and generated with.\n2. Put 4 to 6 photos into a folder in ComfyUI's "
        "`input`, press R and choose it under *folder*.\n3. Say what the subject is under "
        "*class_name*.\n4. Run. Cancel whenever you like: the next run goes on.\n\nThe picture is "
        "of your subject *in the snow*: write something else below *Your subject ...*. The button "
        "in the corner of *Subject LoRA* opens it; *personalise_sd15* has the same nodes side by "
        "side.",
        tall=380,
    )
    return graph


def _generate(
    graph: Graph, at: tuple[int, int], model: Link, clip: Link, vae: Link, prompt: str | Link
) -> None:
    x, y = at
    wanted = graph.add("CLIPTextEncode", (x, y), clip=clip, text=prompt, title="Prompt")
    unwanted = graph.add(
        "CLIPTextEncode", (x, y + 240), clip=clip, text="", title="Negative prompt"
    )
    empty = graph.add("EmptyLatentImage", (x, y + 480), width=512, height=512)
    generated = graph.add(
        "KSampler", (x + 380, y), model=model, positive=wanted.out(), negative=unwanted.out(),
        latent_image=empty.out(), seed=0, steps=25, cfg=7.5, sampler_name="dpmpp_2m",
        scheduler="karras",
    )  # fmt: skip
    picture = graph.add("VAEDecode", (x + 380, y + 440), samples=generated.out(), vae=vae)
    graph.add("SaveImage", (x + 760, y), images=picture.out(), filename_prefix="cntlora", tall=420)


GRAPHS = {
    "personalise_small_model": small_model,
    "personalise_sd15": sd15,
    "subject_lora_sd15": first_run,
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
            write(path, content)
    for path, content in blueprints(info).items():
        write(path, content)


def blueprints(info: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """What ComfyUI offers as a node, by its file."""
    inside = subject_lora("blueprint", "(none)", "dog")
    description = "Teaches Stable Diffusion 1.5 a subject: photos and class in, LoRA and model out."
    folder = HERE.parent / "subgraphs"
    return {folder / f"{inside.name}.json": blueprint(inside, info, description)}


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
