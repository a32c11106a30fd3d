"""What a Stable Diffusion file or folder is.

``identify`` tells from a file's header (no weights are read) or from a folder's
``model_index.json`` what it holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from cntlora_core.runtime.reading import (
    HEADER_LIMIT,
    FileSizeError,
    TensorEntry,
    UnreadableFileError,
    parse_header,
    read_json_object,
    reason,
    require_file,
)

NEEDED = (
    "Needed: a Stable Diffusion 1.5 or XL model, as a .safetensors file with UNet, VAE and text "
    "encoders, as a diffusers folder, or as a hub id (owner/name)."
)
_CONVERT_FILE = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "d = torch.load('IN.ckpt', map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
    "save_file({k: v.clone().contiguous() for k, v in d.items() if hasattr(v, 'shape')}, "
    "'OUT.safetensors')\""
)
_CONVERT_FOLDER = (
    'python -c "from diffusers import StableDiffusionPipeline as P; '
    "P.from_pretrained('IN', safety_checker=None).save_pretrained('OUT')\""
)


class CheckpointError(ValueError):
    """A model that cannot be loaded; the message says what was found and what is needed."""

    def __init__(self, path: str | Path, found: str) -> None:
        between = "" if found.endswith("\n") else " "
        super().__init__(f"{path}: {found}{between}{NEEDED}")


class CheckpointKind(Enum):
    """What a file or folder holds; the value describes it."""

    SD15 = "a Stable Diffusion 1.x model"
    INPAINTING = "a Stable Diffusion inpainting model (its UNet takes 9 channels, not 4)"
    SD2 = "a Stable Diffusion 2.x model (OpenCLIP text encoder, cross-attention width 1024)"
    SDXL = "a Stable Diffusion XL model"
    SDXL_REFINER = "a Stable Diffusion XL refiner"
    SD3 = "a Stable Diffusion 3 model"
    FLUX = "a Flux model"
    LORA = "a LoRA, which changes a model and is loaded on top of one"
    CONTROLNET = "a ControlNet"
    EMBEDDING = "a textual inversion embedding"
    UNET = "a UNet alone, without VAE and text encoder"
    VAE = "a VAE alone"
    TEXT_ENCODER = "a text encoder alone"
    WITHOUT_VAE = "a Stable Diffusion file without its VAE"
    WITHOUT_TEXT_ENCODER = "a Stable Diffusion file without its text encoder"
    UNKNOWN = "a kind of model that is not known here"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name, from its header alone.

    Raises:
        CheckpointError: the file is not a whole safetensors file, or its header contradicts itself.
    """
    return read_whole_header(path)[0]


def read_whole_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of a safetensors file, by name, and the texts in its header, by name.

    Raises:
        CheckpointError: as :func:`read_header`.
    """
    try:
        require_file(path, "a .safetensors file")
        size = path.stat().st_size
        with path.open("rb") as stream:
            first = stream.read(64)
            length = int.from_bytes(first[:8], "little")
            if len(first) < 8 or not 2 <= length <= HEADER_LIMIT or first[8:9] != b"{":
                raise CheckpointError(path, _describe_bytes(first))
            if 8 + length > size:
                raise FileSizeError(8 + length, size)
            stream.seek(8)
            return parse_header(stream.read(length), size)
    except FileSizeError as error:
        raise CheckpointError(path, f"{error}. Download or copy it again.") from None
    except UnicodeDecodeError:
        raise CheckpointError(path, "its safetensors header is damaged: it is not UTF-8.") from None
    except ValueError as error:
        if isinstance(error, (CheckpointError, UnreadableFileError)):
            raise
        found = f"its safetensors header is damaged: {reason(error)}. Download or copy it again."
        raise CheckpointError(path, found) from None


def _describe_bytes(first: bytes) -> str:
    """What a file that is not safetensors begins like."""
    if not first:
        return "the file is empty. Download or copy it again."
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            "this is a pickle (PyTorch's .ckpt, .pt or .bin). Pickles can run code when they are "
            f"opened and are not loaded. If you trust the file, convert it:\n  {_CONVERT_FILE}\n"
        )
    if first.startswith(b"version https://git-lfs"):
        return "this is a git-LFS pointer, not the file itself. Run `git lfs pull` or download it."
    if first.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page, not a model: the download went to a login or error page."
    if first.startswith(b"GGUF"):
        return "this is a quantised GGUF file."
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in first):
        text = first.decode("ascii").strip()
        return f"this is a text file (it begins {text[:40]!r}), not a model."
    return "this is not a safetensors file."


def identify(path: str | Path) -> CheckpointKind:
    """What a file or folder holds, from a file's header or a folder's ``model_index.json``.

    Raises:
        CheckpointError: nothing is there, the file is not a whole safetensors file, or the folder
            holds no model.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _identify_folder(path)
    if not os.path.exists(path):
        raise CheckpointError(path, "there is no such file or folder.")
    return _identify_tensors(read_header(path))


def _identify_tensors(entries: Mapping[str, TensorEntry]) -> CheckpointKind:
    kind = CheckpointKind

    def begins(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in entries)

    def holds(*marks: str) -> bool:
        return any(mark in name for name in entries for mark in marks)

    def size(name: str, axis: int) -> int | None:
        shape = entries[name].shape if name in entries else ()
        return shape[axis] if axis < len(shape) else None

    unet = "model.diffusion_model."
    cross = "1.transformer_blocks.0.attn2.to_k.weight"
    if begins("lora_unet_", "lora_te", "lycoris_") or holds(
        ".lora_A.", ".lora_B.", ".lora.down.", "lora_down.", ".hada_w1_a", ".lokr_w"
    ):
        return kind.LORA
    if begins("control_model.", "input_hint_block.") or holds("controlnet_cond_embedding."):
        return kind.CONTROLNET
    if holds("joint_blocks."):
        return kind.SD3
    if holds("double_blocks.", "single_transformer_blocks."):
        return kind.FLUX
    if begins("conditioner.embedders.0.model."):
        return kind.SDXL_REFINER
    width = size(f"{unet}input_blocks.1.{cross}", 1) or size(
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1
    )
    if begins("cond_stage_model.model.") or width == 1024:
        return kind.SD2
    if size(unet + "input_blocks.0.0.weight", 1) == 9:
        return kind.INPAINTING
    if begins(unet + "input_blocks."):
        whole, encoders = kind.SD15, ("cond_stage_model.transformer.",)
        if begins(unet + "label_emb."):
            whole = kind.SDXL
            encoders = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
        vae, text = begins("first_stage_model."), all(begins(prefix) for prefix in encoders)
        return {
            (True, True): whole,
            (True, False): kind.WITHOUT_TEXT_ENCODER,
            (False, True): kind.WITHOUT_VAE,
            (False, False): kind.UNET,
        }[vae, text]
    if begins("time_embedding.", "time_embed.", "add_embedding.") and begins(
        "down_blocks.", "input_blocks."
    ):
        return kind.UNET
    if begins("first_stage_model.", "decoder.conv_in.", "encoder.conv_in."):
        return kind.VAE
    if holds("token_embedding.", "text_model.encoder.", "transformer.resblocks."):
        return kind.TEXT_ENCODER
    if 0 < len(entries) <= 2 and all(len(entry.shape) <= 2 for entry in entries.values()):
        return kind.EMBEDDING
    return kind.UNKNOWN


def _identify_folder(folder: Path) -> CheckpointKind:
    kind = CheckpointKind
    if not (folder / "model_index.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return kind.LORA
        raise CheckpointError(folder, _describe_folder(folder))
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name", ""))
    for mark, found in (
        ("StableDiffusion3", kind.SD3),
        ("Flux", kind.FLUX),
    ):
        if mark in name:
            return found
    if not name.startswith("StableDiffusion"):
        return kind.UNKNOWN
    if not (folder / "unet" / "config.json").is_file():
        raise CheckpointError(folder, "the folder has no unet/config.json.")
    unet = read_json(folder / "unet" / "config.json")
    if unet.get("in_channels") == 9:
        return kind.INPAINTING
    if unet.get("in_channels", 4) != 4:
        return kind.UNKNOWN
    if "StableDiffusionXL" in name:
        return kind.SDXL_REFINER if index.get("text_encoder") == [None, None] else kind.SDXL
    return kind.SD2 if unet.get("cross_attention_dim") == 1024 else kind.SD15


def _describe_folder(folder: Path) -> str:
    """What a folder without ``model_index.json`` holds, and what may have been meant."""
    names = sorted(item.name + ("/" if item.is_dir() else "") for item in folder.iterdir())
    listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    found = f"the folder has no model_index.json; it holds {listing or 'nothing'}."
    files = sorted(folder.glob("*.safetensors"))
    inner = sorted(item.parent for item in folder.glob("*/model_index.json"))
    inner += sorted(item.parent for item in folder.glob("snapshots/*/model_index.json"))
    for suggestion in [*inner, *files][:3]:
        found += f" Did you mean {suggestion}?"
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError:
        raise CheckpointError(path, "this file is missing.") from None
    except UnreadableFileError as error:
        raise CheckpointError(path, reason(error.__cause__ or error) + ".") from None


def folder_weights(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part of a diffusers folder; full precision before fp16.

    Raises:
        CheckpointError: there are none, or only pickles.
    """
    base = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    inside = folder / part
    if not (inside / "config.json").is_file():
        raise CheckpointError(folder, f"the folder has no {part}/config.json.")
    for variant in ("", ".fp16", ".bf16", ".fp32", ".non_ema"):
        whole = inside / f"{base}{variant}.safetensors"
        if whole.is_file():
            return [whole]
        index = inside / f"{base}.safetensors.index{variant}.json"
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
                raise CheckpointError(index, "its weight_map does not name a file for each weight.")
            return _all_present(folder, sorted({inside / name for name in names.values()}))
    if any(inside.glob("*.bin")):
        raise CheckpointError(
            folder,
            f"{part} is stored as a pickle (.bin) only. Pickles can run code when they are opened "
            f"and are not loaded. If you trust the folder, convert it:\n  {_CONVERT_FOLDER}\n",
        )
    raise CheckpointError(folder, f"{part}/{base}.safetensors is missing.")


def _all_present(folder: Path, files: Iterable[Path]) -> list[Path]:
    files = list(files)
    for file in files:
        if not file.is_file():
            raise CheckpointError(folder, f"{file.relative_to(folder)} is missing.")
    return files
