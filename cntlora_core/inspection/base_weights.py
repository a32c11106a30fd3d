"""Norms of the frozen weights that a LoRA changes, read from a checkpoint one tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from cntlora_core.diffusion.checkpoint import (
    CheckpointError,
    folder_weights,
    read_header,
    read_json,
)
from cntlora_core.diffusion.family import SD15, Family, family_of
from cntlora_core.diffusion.original_layout import original_key
from cntlora_core.lora_file.algebra import LoRALayer
from cntlora_core.lora_file.families import UNET
from cntlora_core.lora_file.names import COMPONENTS, TEXT_MODEL
from cntlora_core.runtime.reading import reading, require_file

_KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lora_")
_WEIGHT = ".weight"


def base_weight_norms(
    model: Path, layers: Mapping[str, LoRALayer]
) -> tuple[dict[str, float], list[str]]:
    """Frobenius norms of the weights that the layers belong to, and notes on those not found.

    Args:
        model: A ``.safetensors`` file, a diffusers folder or a folder with ``.safetensors`` files
            (transformers'); nothing is downloaded.
        layers: By name, as `lora_contents` gives them.

    Raises:
        ValueError: it is no checkpoint, or none of the layers belongs to it.
    """
    if not os.path.exists(model):
        raise ValueError(f"there is no base model at {model}: give a file or folder on the disk")
    index = _Index(model)
    norms: dict[str, float] = {}
    missing: list[str] = []
    for name, layer in layers.items():
        place = index.find(name)
        if place is None:
            missing.append(name)
            continue
        with reading(place[0], "a model"), safe_open(place[0], framework="pt") as file:
            weight = file.get_tensor(place[1])
        wanted = layer.up.shape[0] * layer.down[0].numel()
        if layer.mid is not None:
            wanted *= math.prod(layer.mid.shape[2:])
        if weight.numel() != wanted:
            raise ValueError(
                f"{model} is not the base of this LoRA: {place[1]} has shape "
                f"{tuple(weight.shape)}, the LoRA changes a weight of {wanted} values there"
            )
        norms[name] = float(weight.float().norm())
    if not norms:
        raise ValueError(
            f"{model} is not the base of this LoRA: it has no weight for {next(iter(layers))}"
        )
    if missing:
        return norms, [f"{len(missing)} layers have no weight in {model.name}, as {missing[0]}"]
    return norms, []


class _Index:
    """Where the weights of a checkpoint are."""

    def __init__(self, model: Path) -> None:
        self._family = SD15
        with suppress(CheckpointError):  # any model will do here
            self._family = family_of(model)
        if not model.is_dir():
            require_file(model, "a base model's .safetensors file")
        self._single = model.is_file()
        self._groups: dict[str, dict[str, tuple[Path, str]]] = {}
        if self._single:
            self._groups[""] = self._read([model])
        elif (model / "model_index.json").is_file():
            for part in (UNET, *self._family.text_encoders):
                self._groups[part] = self._read(folder_weights(model, part))
        else:
            files = sorted(model.glob("*.safetensors"))
            if not files:
                raise ValueError(f"{model} holds no .safetensors file: give the base model's")
            self._groups[""] = self._read(files)
        self._flat = {
            group: {key.replace(".", "_"): place for key, place in places.items()}
            for group, places in self._groups.items()
        }

    @staticmethod
    def _read(files: list[Path]) -> dict[str, tuple[Path, str]]:
        places = {}
        for file in files:
            for key in read_header(file):
                if key.endswith(_WEIGHT):
                    places[key.removesuffix(_WEIGHT)] = (file, key)
        return places

    def find(self, name: str) -> tuple[Path, str] | None:
        """File and key of a layer's weight; None where there is none or more than one."""
        component, _, path = name.partition(".")
        if component not in COMPONENTS:
            component, path = "", name
        if self._single and component:
            original = _original(component, path, self._family)
            for key in (original, original.replace(f".{TEXT_MODEL}", ".") if original else None):
                if key in self._groups[""]:
                    return self._groups[""][key]
        flat = path.replace(".", "_")
        for prefix in _KOHYA_PREFIXES:
            if name.startswith(prefix):
                flat = name.removeprefix(prefix)
                break
        places = self._flat.get(component, self._flat.get("", {}))
        if flat in places:
            return places[flat]
        # A model within another has its path behind the other's: bert.encoder... and encoder...
        fits = [
            place
            for key, place in places.items()
            if key.endswith("_" + flat) or (key.count("_") > 1 and flat.endswith("_" + key))
        ]
        return fits[0] if len(fits) == 1 else None


def _original(component: str, path: str, family: Family) -> str | None:
    try:
        config = read_json(family.configs / component / "config.json")
        key = original_key(component, path + _WEIGHT, config, family.prefixes[component])
        return key.removesuffix(_WEIGHT)
    except (ValueError, KeyError):
        return None
