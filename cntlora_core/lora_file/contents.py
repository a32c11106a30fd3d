"""What a LoRA file of any tool and any model holds, taken as it is: for looking, not for loading.

`lora_reading.read_lora_file` reads LoRAs for SD 1.5 and SDXL and refuses what it could not apply.
Here any plain LoRA is read, whatever model it is for, and what else the file holds is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cntlora_core.lora_file.algebra import LoRALayer
from cntlora_core.lora_file.names import (
    PEFT_PREFIX,
    UNET,
    Layout,
    Role,
    canonical_name,
    layout_of,
    split_key,
)
from cntlora_core.lora_file.peft_config import (
    DIFFUSERS_METADATA_KEY,
    header_configs,
    read_peft_config,
)
from cntlora_core.lora_file.reading import (
    FOREIGN,
    PEFT_CONFIG,
    layer_of,
    load_tensors,
    parts_of_folder,
)

# peft's adapters of embeddings: the delta is that of a linear layer, transposed.
_EMBEDDING: dict[str, Role] = {".lora_embedding_A": "down", ".lora_embedding_B": "up"}
# CLIP's text encoder; other encoders have an "encoder" and "embeddings" too.
_CLIP_TEXT = re.compile(
    r"text_encoder(?:_2)?\.(encoder\.layers\.\d+\.(self_attn|mlp)|embeddings)\."
)


@dataclass(frozen=True, eq=False)
class LoRAContents:
    """A file's layers and what it says of itself.

    Attributes:
        layers: By name: the canonical one for Stable Diffusion's modules, else the module as the
            file spells it (without peft's ``base_model.model.``).
        layout: Whose spelling it is.
        metadata: The strings of the header.
        configs: peft's configurations by component (``""`` where there is one for all).
        notes: What else the file holds, or lacks, in words.
    """

    layers: dict[str, LoRALayer]
    layout: Layout
    metadata: dict[str, str]
    configs: dict[str, Any]
    notes: tuple[str, ...]


def read_contents(path: Path) -> LoRAContents:
    """Everything that is a LoRA layer in a file, or in a folder of peft's.

    Args:
        path: A ``.safetensors`` file; a folder with ``adapter_model.safetensors``, or with such
            folders ``unet/`` and ``text_encoder/``.

    Raises:
        ValueError: no LoRA is in it; says what is.
    """
    files = parts_of_folder(path) if path.is_dir() else {None: path}
    layers: dict[str, LoRALayer] = {}
    metadata: dict[str, str] = {}
    configs: dict[str, Any] = {}
    notes: list[str] = []
    layout: Layout = "diffusers"
    for component, file in files.items():
        tensors, header = load_tensors(file)
        metadata |= header
        modules, others = _grouped(tensors)
        layout = _layout(file, tensors, modules)
        own = _configs(file, layout, header, component, notes)
        configs |= own
        for module, roles in modules.items():
            name = _name(module, component)
            if layer := _layer(name, module, roles, own, notes):
                layers[name] = layer
        notes += _said_of(others)
    if not layers:
        raise ValueError(
            f"{path} holds no whole LoRA layer: {'; '.join(notes[:3])}. Give another file."
        )
    return LoRAContents(layers, layout, metadata, configs, tuple(notes))


def _grouped(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[Role, Tensor]], list[str]]:
    """LoRA factors by module, and the names of all other tensors."""
    modules: dict[str, dict[Role, Tensor]] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        embedding = next((end for end in _EMBEDDING if key.endswith(end)), None)
        if embedding is not None:
            modules.setdefault(key.removesuffix(embedding), {})[_EMBEDDING[embedding]] = tensor
        elif parts := split_key(key):
            modules.setdefault(parts.module, {})[parts.role] = tensor
        else:
            others.append(key)
    # LyCORIS gives its other methods an alpha too.
    return {m: roles for m, roles in modules.items() if roles.keys() != {"alpha"}}, others


def _layout(
    file: Path, tensors: Mapping[str, Tensor], modules: Mapping[str, Mapping[Role, Tensor]]
) -> Layout:
    factors = [m for m, roles in modules.items() if roles.keys() & {"down", "up"}]
    if factors:
        return layout_of(factors[0])
    for kind, endings in FOREIGN.items():
        if key := next((key for key in tensors if key.endswith(endings)), None):
            raise ValueError(f"{file} is not a LoRA but {kind} (it has {key})")
    some = ", ".join(sorted(tensors)[:3]) or "no tensors"
    raise ValueError(f"{file} is not a LoRA: none of its tensors is a LoRA factor (it has {some})")


def _configs(
    file: Path, layout: Layout, header: Mapping[str, str], component: str | None, notes: list[str]
) -> dict[str, Any]:
    if layout != "peft":
        try:
            return header_configs(header)
        except ValueError as error:
            notes.append(f"the header's {DIFFUSERS_METADATA_KEY} is damaged: {error}")
            return {}
    beside = file.with_name(PEFT_CONFIG)
    if not beside.is_file():
        notes.append(
            f"{PEFT_CONFIG}, where the scale of a peft adapter stands, is not beside {file.name}: "
            "alpha is taken to be the rank"
        )
        return {}
    return {component or "": read_peft_config(beside, file)}


def _name(module: str, component: str | None) -> str:
    spelled = module if component is None else f"{component}.{module}"
    canonical = canonical_name(spelled)
    if canonical and (canonical.startswith(UNET) or _CLIP_TEXT.match(canonical)):
        return canonical
    return spelled.replace(PEFT_PREFIX, "", 1)


def _layer(
    name: str,
    module: str,
    roles: Mapping[Role, Tensor],
    configs: Mapping[str, Any],
    notes: list[str],
) -> LoRALayer | None:
    if "down" not in roles or "up" not in roles:
        notes.append(f"{module} has no {'down' if 'up' in roles else 'up'} factor: left out")
        return None
    # One configuration holds whatever the name begins with.
    given, place = ({"": configs[""]}, f".{name}") if "" in configs else (configs, name)
    try:
        return layer_of(roles, given, module, place)
    except ValueError as error:
        notes.append(f"{module}: {error}: left out")
        return None


def _said_of(others: list[str]) -> list[str]:
    """What the tensors that are no LoRA factors are, by kind."""
    notes = []
    left = list(others)
    for kind, endings in FOREIGN.items():
        found = [key for key in left if key.endswith(endings)]
        left = [key for key in left if not key.endswith(endings)]
        if not found:
            continue
        if kind == "DoRA":
            ending = next(end for end in endings if found[0].endswith(end))
            notes.append(
                f"DoRA: {len(found)} layers have a magnitude ({ending}); the numbers are those of "
                "their low-rank part alone"
            )
        else:
            notes.append(f"{len(found)} tensors belong to {kind}, as {found[0]}: left out")
    if left:
        notes.append(f"{len(left)} tensors are no part of a LoRA, as {left[0]}: left out")
    return notes
