"""What widgets share: defaults from the core's settings, choices from ComfyUI's folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cntlora_core import mini
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.data.photos import IMAGE_SUFFIXES
from cntlora_core.methods.registry import image_file_methods

from .host import folder_paths

CATEGORY = "CNTLoRA"
ADVANCED = {"advanced": True}
"""For ``extra_dict``: the widget shows after "Show Advanced" in the node's menu."""
HIDDEN = {"hidden": True}
"""Likewise: the widget never shows, and keeps the value that a saved graph has for it."""

SMALL_MODEL = "small model (built in, 64 px)"
SMALL_ENCODER = "small (built in, for 64 px)"
FOLDER_MARK = "diffusers/"
NO_FOLDER = "(none)"
EXAMPLE_MARK = "example/"
LARGEST_SEED = 2**32 - 1


def default_of(settings: type, name: str) -> Any:
    """The default of a field of a settings class, so that it stands in one place."""
    field = {f.name: f for f in dataclasses.fields(settings)}[name]
    return field.default


def method_names() -> list[str]:
    """The ways to initialise a LoRA, as the core knows them."""
    return list(image_file_methods())


def default_method() -> str:
    return CNTLoRAConfig.constraint


def model_names() -> list[str]:
    """Checkpoints, diffusers folders, and the embedded model."""
    folders = [
        f"{FOLDER_MARK}{index.parent.name}"
        for root in folder_paths.get_folder_paths("diffusers")
        for index in sorted(Path(root).glob("*/model_index.json"))
    ]
    return [*folder_paths.get_filename_list("checkpoints"), *dict.fromkeys(folders), SMALL_MODEL]


def model_path(name: str) -> Path:
    """Where the model of that name is.

    Raises:
        FileNotFoundError: there is none.
    """
    if name == SMALL_MODEL:
        return mini.model_path()
    if name not in model_names():
        raise FileNotFoundError(f"there is no checkpoint {name!r} in ComfyUI's model folders")
    if name.startswith(FOLDER_MARK):
        for root in folder_paths.get_folder_paths("diffusers"):
            folder = Path(root) / name.removeprefix(FOLDER_MARK)
            if (folder / "model_index.json").is_file():
                return folder
    return Path(folder_paths.get_full_path_or_raise("checkpoints", name))


def _encoder_folders(kind: str) -> dict[str, Path]:
    """Folders of transformers' layout in ComfyUI's clip_vision folders, CLIP models or others."""
    found = {}
    for root in folder_paths.get_folder_paths("clip_vision"):
        for config in sorted(Path(root).glob("*/config.json")):
            try:
                is_clip = json.loads(config.read_text("utf-8")).get("model_type") == "clip"
            except (OSError, ValueError, AttributeError):
                continue
            if is_clip == (kind == "clip"):
                found.setdefault(config.parent.name, config.parent)
    return found


def encoder_names(kind: str) -> list[str]:
    """The embedded encoder, and those that ComfyUI has a folder of; kind: vision or clip."""
    return [SMALL_ENCODER, *_encoder_folders(kind)]


def encoder_source(name: str, kind: str) -> str:
    """What the core calls the encoder of that name.

    Raises:
        FileNotFoundError: there is none.
    """
    if name == SMALL_ENCODER:
        return "small"
    folders = _encoder_folders(kind)
    if name not in folders:
        raise FileNotFoundError(f"there is no encoder {name!r} in ComfyUI's clip_vision folders")
    return str(folders[name])


def input_folders() -> list[str]:
    """No folder, the folders of ComfyUI's input directory that hold pictures, the examples."""
    root = Path(folder_paths.get_input_directory())
    found = (p.parent for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    names = {folder.relative_to(root).as_posix() for folder in found if folder != root}
    own = sorted(name for name in names if not name.startswith((".", EXAMPLE_MARK)))
    return [NO_FOLDER, *own, *(f"{EXAMPLE_MARK}{name}" for name in mini.subjects())]


def input_folder(name: str) -> Path:
    """The folder of that name in ComfyUI's input directory, or the photos of an example.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    if name.startswith(EXAMPLE_MARK):
        return mini.subject(name.removeprefix(EXAMPLE_MARK)).photos
    root = Path(folder_paths.get_input_directory()).resolve()
    folder = (root / name).resolve()
    if root not in folder.parents or not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {name!r} with pictures in ComfyUI's input")
    return folder


def lora_files() -> list[str]:
    """No file, and those of ComfyUI's loras folders."""
    return [NO_FOLDER, *folder_paths.get_filename_list("loras")]


def lora_file(name: str) -> str | None:
    """Where the LoRA of that name is; None for no file.

    Raises:
        FileNotFoundError: there is none.
    """
    return None if name == NO_FOLDER else folder_paths.get_full_path_or_raise("loras", name)


def work_folder() -> Path:
    """Where runs and what can be made again are kept."""
    return Path(folder_paths.get_output_directory()) / "cntlora"


def lines(text: str) -> tuple[str, ...]:
    """The lines of a text widget that say something."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def numbers(text: str, kind: type, name: str) -> tuple[Any, ...]:
    """Numbers separated by commas or spaces.

    Raises:
        ValueError: naming the widget and what is no number.
    """
    found = []
    for piece in text.replace(",", " ").split():
        try:
            found.append(kind(piece))
        except ValueError:
            raise ValueError(f"{name}: {piece!r} is no number; write them as in 0, 1, 2") from None
    return tuple(found)
