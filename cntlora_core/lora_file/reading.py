"""Reading LoRA files, whoever wrote them: kohya, diffusers (old and new) and peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from cntlora_core.lora_file.algebra import LoRALayer, LoRALayers
from cntlora_core.lora_file.families import SD15_FILES, FileFamily, family_of_keys
from cntlora_core.lora_file.names import (
    COMPONENTS,
    SECOND_TEXT_ENCODER,
    Layout,
    canonical_name,
    kohya_table,
    layout_of,
    split_key,
)
from cntlora_core.lora_file.peft_config import config_alpha, header_configs, read_peft_config
from cntlora_core.runtime.reading import (
    FLOATS,
    HEADER_LIMIT,
    FileSizeError,
    TensorEntry,
    is_finite,
    parse_header,
    reading,
    reason,
    require_file,
)

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

FOREIGN = {
    "DoRA": (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    "LoHa": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
    "LoKr": (".lokr_w1", ".lokr_w1_a", ".lokr_w2", ".lokr_w2_a", ".lokr_t2"),
    "OFT or BOFT": (".oft_blocks", ".oft_diag"),
    "GLoRA": (".a1.weight", ".b2.weight"),
    "LoRA with a bias": (".lora_B.bias", ".lora_up.bias"),
    "a full difference of weights": (".diff", ".diff_b"),
}
"""Endings of the tensors that other methods than plain LoRA keep in a file, by the method."""


@dataclass(frozen=True, eq=False)
class LoRAFile:
    """A file's content. ``unknown_keys`` fit no layer of its family (with ``strict=False``)."""

    layers: LoRALayers
    metadata: dict[str, str]
    layout: Layout
    unknown_keys: tuple[str, ...] = ()
    family: FileFamily = SD15_FILES


def read_lora_file(
    path: str | Path, *, module_names: Iterable[str] | None = None, strict: bool = True
) -> LoRAFile:
    """Reads any LoRA for SD 1.5 or SDXL: a kohya, diffusers or peft file, or a peft folder.

    Factors come back in float32. A missing alpha means alpha = rank, as every reader takes it; a
    peft file needs its ``adapter_config.json``, where the scale stands.

    Args:
        path: a ``.safetensors`` file, a folder with ``adapter_config.json``, or one with such
            folders ``unet/``, ``text_encoder/`` and ``text_encoder_2/``.
        module_names: canonical names of a model's modules, for models with other module names
            than Stable Diffusion's.
        strict: keys that fit no layer are an error; else a warning, and `LoRAFile.unknown_keys`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is something else, in words: a full checkpoint, a pickle, a cut-off file,
            DoRA, LoHa, LoKr, a layer with one factor missing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no LoRA at {path}")
    names = list(module_names or ())
    table = kohya_table(names, family_of_keys(names)) if names else None
    files = parts_of_folder(path) if path.is_dir() else {None: path}
    layers: LoRALayers = {}
    metadata: dict[str, str] = {}
    unknown: list[str] = []
    keys: list[str] = []
    layout: Layout = "peft"
    for component, file in files.items():
        tensors, header = load_tensors(file)
        _require_lora(file, tensors)
        found, layout, odd = _layers_of(file, tensors, header, component, table)
        layers |= found
        metadata |= header
        unknown += odd
        keys += tensors
    family = family_of_keys([*keys, *layers], metadata)
    if unknown:
        said = (
            f"{path} has {len(unknown)} keys that fit no layer of {family.title}: "
            f"{', '.join(unknown[:5])}"
        )
        said += ", ..." if len(unknown) > 5 else ""
        if strict or not layers:
            raise ValueError(said + ". Is it a LoRA for another model?")
        warnings.warn(said, stacklevel=2)
    return LoRAFile(layers, metadata, layout, tuple(unknown), family)


def load_lora_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA file's tensors by their keys, copied into memory, and its header.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is something else, in words.
    """
    path = Path(path)
    tensors, header = load_tensors(path)
    _require_lora(path, tensors)
    return {key: tensor.clone() for key, tensor in tensors.items()}, header


def check_usable(
    path: Path, tensors: Mapping[str, Tensor], family: FileFamily = SD15_FILES
) -> tuple[str, ...]:
    """Refuses what diffusers would load without a word, or generate black images with.

    Args:
        path: What messages name.
        tensors: The content of a LoRA file.
        family: Of the model that it is to be applied to.

    Returns:
        What diffusers leaves out of the file, in words.

    Raises:
        ValueError: it is no LoRA for such a model, or a value is not finite.
    """
    _require_lora(path, tensors, tolerate=("DoRA",))
    blocks = ("lora_unet_input_blocks_", "lora_unet_output_blocks_")
    if not family.original_unet and any(key.startswith(blocks) for key in tensors):
        raise ValueError(
            f"{path} names its blocks as LoRAs for SDXL do (input_blocks, output_blocks); "
            "one for SD 1.5, with down_blocks and up_blocks, is needed"
        )
    require_finite(path, tensors)
    for module, roles in _by_module(tensors)[0].items():
        if {"down", "up"} <= roles.keys():
            try:
                LoRALayer(roles["down"], roles["up"], 1.0, roles.get("mid"))
            except ValueError as error:
                raise ValueError(f"{path}: {module}: {error}. Use another file.") from None
    notes = []
    second = [key for key in tensors if key.startswith(("lora_te2_", "text_encoder_2."))]
    if second and SECOND_TEXT_ENCODER not in family.kohya:
        notes.append(
            f"{path.name}: {len(second)} keys of a second text encoder, as {second[0]}, are left "
            "out: this model has one"
        )
    scales = [key for key in tensors if key.endswith(FOREIGN["DoRA"])]
    if scales:
        notes.append(
            f"{path.name} is a DoRA: {len(scales)} magnitudes, as {scales[0]}, are left out, and "
            "only its low-rank part acts"
        )
    return tuple(notes)


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a value is not finite, naming the tensor."""
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"{path}: {key} has values that are not finite; the file is damaged, or its "
                "training blew up. Use another one."
            )


def read_lora_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, name: str = "the LoRA"
) -> LoRAFile:
    """The same for the content of one ``.safetensors`` file that is in memory.

    Args:
        tensors: By key, in kohya's or diffusers' layout.
        metadata: The file's header.
        name: What error messages call it.

    Raises:
        ValueError: it is something else, in words.
    """
    header = dict(metadata or {})
    _require_lora(Path(name), tensors)
    layers, layout, unknown = _layers_of(Path(name), dict(tensors), header, None, None)
    if not layers:
        raise ValueError(
            f"{name} has no key that fits a layer of SD 1.5 or SDXL; it has {unknown[:5]}"
        )
    family = family_of_keys([*tensors, *layers], header)
    return LoRAFile(layers, header, layout, tuple(unknown), family)


def parts_of_folder(folder: Path) -> dict[str | None, Path]:
    """The weights in a peft folder, by component; None where the folder is one adapter's own.

    Raises ValueError where there are none.
    """
    if (folder / PEFT_WEIGHTS).is_file():
        return {None: folder / PEFT_WEIGHTS}
    parts: dict[str | None, Path] = {
        component: folder / component / PEFT_WEIGHTS
        for component in COMPONENTS
        if (folder / component / PEFT_WEIGHTS).is_file()
    }
    if not parts:
        raise ValueError(
            f"{folder} is no peft folder: neither it nor unet/ or text_encoder/ in it has "
            f"{PEFT_WEIGHTS}. Name a .safetensors file instead."
        )
    return parts


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and the strings of its header.

    Raises ValueError, in words, where it is a pickle, cut off or something else.
    """
    require_file(path, "a LoRA's .safetensors file")
    with reading(path, "a LoRA"), path.open("rb") as file:
        start = file.read(16)
    # A safetensors file begins with the length of its JSON header.
    if (
        start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        and start[8:9] != b"{"
    ):
        raise ValueError(
            f"{path} is a pickle (.ckpt, .pt, .bin), which can run code when it is read; "
            "a .safetensors file is needed"
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 16 or not 2 <= length <= HEADER_LIMIT or start[8:9] != b"{":
        raise ValueError(
            f"{path} is no safetensors file: it begins with {start[:16]!r}. Download or copy it "
            "again."
        )
    try:
        with path.open("rb") as file:
            file.seek(8)
            size = path.stat().st_size
            if 8 + length > size:
                raise FileSizeError(8 + length, size)
            entries, metadata = parse_header(file.read(length), size)
        _require_numbers(entries)
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in entries}, metadata
    except Exception as error:
        raise ValueError(
            f"{path} is cut off or damaged: {reason(error)}. Download or copy it again."
        ) from error


def _require_numbers(entries: Mapping[str, TensorEntry]) -> None:
    """A LoRA's factors are floating-point numbers; an alpha may be a whole number."""
    for key, entry in entries.items():
        split = split_key(key)
        whole = split is not None and split.role == "alpha" and entry.dtype.startswith(("I", "U"))
        if split is not None and entry.dtype not in FLOATS and not whole:
            raise ValueError(f"{key} holds {entry.dtype}, and a LoRA floating-point numbers")


def _require_lora(
    path: Path, tensors: Mapping[str, Tensor], tolerate: tuple[str, ...] = ()
) -> None:
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in tensors):
        raise ValueError(f"{path} is a full Stable Diffusion checkpoint, not a LoRA")
    for kind, endings in FOREIGN.items():
        for key in tensors:
            if key.endswith(endings) and kind not in tolerate:
                raise ValueError(
                    f"{path} is not a plain LoRA but {kind} ({key}), which is not supported"
                )
    if not any((parts := split_key(key)) and parts.role in ("down", "up") for key in tensors):
        some = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise ValueError(f"{path} is no LoRA: none of its tensors is a LoRA factor (it has {some})")


def _by_module(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by module and role, and the names of those that are no part of a LoRA."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        if split := split_key(key):
            parts.setdefault(split.module, {})[split.role] = tensor
        else:
            others.append(key)
    return parts, others


def _layers_of(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    component: str | None,
    table: dict[str, str] | None,
) -> tuple[LoRALayers, Layout, list[str]]:
    parts, unknown = _by_module(tensors)
    layout = layout_of(next(module for module, roles in parts.items() if "down" in roles))
    configs = _peft_configs(path) if layout == "peft" else header_configs(header)
    layers: LoRALayers = {}
    for module, roles in parts.items():
        spelled = module if component is None else f"{component}.{module}"
        name = canonical_name(spelled, table)
        if name is None or roles.keys() <= {"alpha"}:
            unknown += [f"{module} ({', '.join(sorted(roles))})"]
            continue
        if "down" not in roles or "up" not in roles:
            missing = "down" if "down" not in roles else "up"
            raise ValueError(f"{path}: {module} has no {missing} factor; the file is not complete")
        if name in layers:
            raise ValueError(f"{path} has two LoRA layers for {name}")
        require_finite(path, {f"{module} ({role})": tensor for role, tensor in roles.items()})
        try:
            layers[name] = layer_of(roles, configs, spelled, name)
        except ValueError as error:
            raise ValueError(f"{path}: {module}: {error}") from None
    return layers, layout, unknown


def layer_of(
    roles: Mapping[Any, Tensor], configs: Mapping[str, Any], spelled: str, name: str
) -> LoRALayer:
    """A layer from its tensors, in float32.

    Args:
        roles: ``down`` and ``up``, and ``mid`` and ``alpha`` where the file has them.
        configs: peft configurations by component, which give an alpha where the file has none.
        spelled: The layer as the file spells it.
        name: Its canonical name.

    Raises:
        ValueError: shapes do not belong together, or the alpha is no number.
    """
    down, mid = roles["down"], roles.get("mid")
    rank = down.shape[0] if down.ndim else 0
    if "alpha" not in roles:
        alpha = config_alpha(configs, spelled, name, rank)
    elif roles["alpha"].numel() != 1:
        raise ValueError(f"alpha is one number, got shape {tuple(roles['alpha'].shape)}")
    else:
        alpha = float(roles["alpha"])
    return LoRALayer(down.float(), roles["up"].float(), alpha, None if mid is None else mid.float())


def _peft_configs(path: Path) -> dict[str, Any]:
    """The adapter's configuration beside its weights, for any component."""
    file = path.with_name(PEFT_CONFIG)
    if not file.is_file():
        raise ValueError(
            f"{path} is a peft adapter, whose scale stands in {PEFT_CONFIG}; "
            "put that file beside it"
        )
    config = read_peft_config(file, path)
    if config.get("use_dora"):
        raise ValueError(f"{path} is not a plain LoRA but DoRA, which is not supported")
    return dict.fromkeys(COMPONENTS, config)
