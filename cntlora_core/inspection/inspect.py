"""The numbers of a LoRA file: ranks, scales, norms and spectra of every attachment point.

The delta of a layer is never built: its singular values are those of a small core, from the QR of
both factors (`lora_algebra.singular_values`). Of a convolution they are those of its kernel as a
matrix (out, in * kh * kw).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from cntlora_core.inspection.base_weights import base_weight_norms
from cntlora_core.lora_file.algebra import LoRALayer, singular_values
from cntlora_core.lora_file.contents import LoRAContents, read_contents
from cntlora_core.lora_file.names import TEXT_ENCODER, UNET
from cntlora_core.runtime.reading import json_object, read_json_object, user_path
from cntlora_core.runtime.thread_pool import map_in_threads

RUN_RECORD, RUN_STATE = "run.json", "state.safetensors"
TOP_VALUES = 8
"""How many singular values of a layer go into a JSON description."""

_CROSS_ATTENTION_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_TRAINING_FACTS = (
    *("learning_rate", "unet_lr", "text_encoder_lr", "optimizer", "lr_scheduler"),
    *("max_train_steps", "steps", "epoch", "seed", "num_train_images", "num_reg_images"),
    *("resolution", "network_dim", "network_alpha", "prior_loss_weight"),
)


@dataclass(frozen=True)
class LayerInspection:
    """One attachment point of a LoRA file.

    Attributes:
        name: Its name: SD 1.5's module path under ``unet.`` or ``text_encoder.``, else as the file
            has it.
        part: The part of the model that it belongs to, in words.
        kind: ``linear``, or ``conv`` and the kernel.
        in_features, out_features: Channels that the delta reads and gives.
        rank: Rows of the down factor.
        alpha: The delta is ``alpha / rank * up @ down``.
        finite: Whether all values are; if not, all numbers below are 0.
        norm: Frobenius norm of the delta.
        relative_norm: The same, of that of the frozen weight; None where that is not known.
        stable_rank: ``sum(S^2) / S_1^2``: how many directions share the delta's energy.
        energy_quarter, energy_half: Fractions of ``sum(S^2)`` in the largest quarter and half of
            the directions that the rank allows.
        singular_values: Of the delta, descending; at most ``rank``.
    """

    name: str
    part: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    finite: bool
    norm: float
    relative_norm: float | None
    stable_rank: float
    energy_quarter: float
    energy_half: float
    singular_values: tuple[float, ...]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class PartInspection:
    """All layers of one part of the model together, their deltas taken as one long vector.

    Attributes:
        part: Its name in words.
        points: Attachment points.
        total_rank: Sum of their ranks.
        ranks: The smallest, the median and the largest.
        parameters: Of the factors.
        norm: Frobenius norm of all deltas.
        relative_norm: The same, of that of the frozen weights; None where one is not known.
        stable_rank: Median of the layers' own.
        energy_quarter, energy_half: Fractions of the whole energy that the layers' largest quarter
            and half of directions hold.
        largest_value: The largest singular value, and the layer that has it.
    """

    part: str
    points: int
    total_rank: int
    ranks: tuple[int, float, int]
    parameters: int
    norm: float
    relative_norm: float | None
    stable_rank: float
    energy_quarter: float
    energy_half: float
    largest_value: tuple[float, str]


@dataclass(frozen=True)
class LoRAInspection:
    """What a LoRA file is.

    Attributes:
        path: The file, or the folder of peft's layout.
        layout: ``kohya``, ``diffusers`` or ``peft``.
        base_model: What it was trained on, as it says, or as its shapes say.
        method: How it was initialised or what made it, as it says.
        settings: What it says of its making.
        layers: By name, numbers by size.
        parts: In order of appearance.
        notes: What else is in the file or wrong with it, in words.
        metadata: The strings of its header.
        run: What the record of the run says, where there is one: model, prompts, steps, seconds,
            ranks while it was trained, error of the export, notes.
    """

    path: Path
    layout: str
    base_model: str | None
    method: str | None
    settings: dict[str, Any]
    layers: tuple[LayerInspection, ...]
    parts: tuple[PartInspection, ...]
    notes: tuple[str, ...]
    metadata: dict[str, str]
    run: dict[str, Any] | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by layer: those that were trained, where the run's record knows them.

        The file of a method that rewrites the base holds the trained minus the initial adapter, of
        twice the rank.
        """
        trained = (self.run or {}).get("trained_ranks", {})
        return {layer.name: trained.get(layer.name, layer.rank) for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """JSON values; of the singular values only the largest `TOP_VALUES`."""
        values = dataclasses.asdict(self)
        values["path"] = str(self.path)
        for layer in values["layers"]:
            layer["singular_values"] = layer["singular_values"][:TOP_VALUES]
        return values


def inspect_lora(
    path: str | Path,
    *,
    model: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoRAInspection:
    """Read any LoRA and measure it.

    Args:
        path: A ``.safetensors`` file of kohya's, diffusers' or peft's make; a folder that peft
            saved; or the folder of a run of ``cntlora train``.
        model: The base model, as a ``.safetensors`` file, a diffusers folder or a transformers
            folder, for norms relative to the frozen weights.
        progress: Called with (layers done, total).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no LoRA, in words: a pickle, a cut-off file, a full checkpoint, LoHa or
            LoKr, an unfinished run; or the base model is of another make.
    """
    found, run = _locate(user_path(path))
    contents = read_contents(found)
    notes = list(contents.notes)
    norms: Mapping[str, float] = {}
    if model is not None:
        norms, said = base_weight_norms(user_path(model), contents.layers)
        notes += said
    names = sorted(contents.layers, key=_natural)
    layers = tuple(
        map_in_threads(
            lambda name: _inspect_layer(name, contents.layers[name], norms.get(name)),
            names,
            progress,
        )
    )
    if wrong := [layer.name for layer in layers if not layer.finite]:
        notes.append(f"{len(wrong)} layers hold values that are not finite, as {wrong[0]}")
    return LoRAInspection(
        path=found,
        layout=contents.layout,
        base_model=_base_model(contents),
        method=_method(contents),
        settings=_settings(contents),
        layers=layers,
        parts=_parts(layers),
        notes=tuple(notes),
        metadata=contents.metadata,
        run=run,
    )


def _inspect_layer(name: str, layer: LoRALayer, base_norm: float | None) -> LayerInspection:
    finite = all(
        bool(t.isfinite().all()) for t in (layer.down, layer.up, layer.mid) if t is not None
    ) and math.isfinite(layer.alpha)
    values = singular_values(layer) if finite else layer.down.new_zeros(0)
    energies = values.square()
    total = float(energies.sum())
    kernel = (layer.down if layer.mid is None else layer.mid).shape[2:]
    return LayerInspection(
        name=name,
        part=part_of(name),
        kind=f"conv {'x'.join(map(str, kernel))}" if kernel else "linear",
        in_features=layer.down.shape[1],
        out_features=layer.up.shape[0],
        rank=layer.rank,
        alpha=layer.alpha if math.isfinite(layer.alpha) else 0.0,
        finite=finite,
        norm=math.sqrt(total),
        relative_norm=math.sqrt(total) / base_norm if base_norm else None,
        stable_rank=total / float(energies[0]) if total > 0 else 0.0,
        energy_quarter=_leading(energies, layer.rank / 4),
        energy_half=_leading(energies, layer.rank / 2),
        singular_values=tuple(values.tolist()),
    )


def _leading(energies: Tensor, count: float) -> float:
    total = float(energies.sum())
    return float(energies[: math.ceil(count)].sum()) / total if total > 0 else 0.0


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def part_of(name: str) -> str:
    """The part of a model that a layer's name belongs to: what stands before its first number."""
    for prefix, part in (
        (f"{UNET}.", "UNet"),
        ("lora_unet_", "UNet"),
        (f"{TEXT_ENCODER}.", "text encoder"),
        ("lora_te1_", "text encoder"),
        ("lora_te2_", "text encoder 2"),
        ("text_encoder_2.", "text encoder 2"),
        ("lora_te3_", "text encoder 3"),
        ("text_encoder_3.", "text encoder 3"),
    ):
        if name.startswith(prefix):
            return part
    stem = re.split(r"[._]\d", name, maxsplit=1)[0]
    return stem if stem != name else name.partition(".")[0]


def _parts(layers: tuple[LayerInspection, ...]) -> tuple[PartInspection, ...]:
    groups: dict[str, list[LayerInspection]] = {}
    for layer in layers:
        groups.setdefault(layer.part, []).append(layer)
    return tuple(_part(part, group) for part, group in groups.items())


def _part(part: str, layers: list[LayerInspection]) -> PartInspection:
    energies = [layer.norm**2 for layer in layers]
    total = sum(energies)
    base = [
        (layer.norm / layer.relative_norm) ** 2 if layer.relative_norm else None for layer in layers
    ]
    known = [value for value in base if value is not None]
    ranks = [layer.rank for layer in layers]

    def share(fractions: list[float]) -> float:
        return sum(f * e for f, e in zip(fractions, energies, strict=True)) / total if total else 0

    return PartInspection(
        part=part,
        points=len(layers),
        total_rank=sum(ranks),
        ranks=(min(ranks), median(ranks), max(ranks)),
        parameters=sum(_parameters(layer) for layer in layers),
        norm=math.sqrt(total),
        relative_norm=math.sqrt(total / sum(known)) if len(known) == len(layers) else None,
        stable_rank=median(layer.stable_rank for layer in layers),
        energy_quarter=share([layer.energy_quarter for layer in layers]),
        energy_half=share([layer.energy_half for layer in layers]),
        largest_value=max(((layer.singular_values or (0.0,))[0], layer.name) for layer in layers),
    )


def _parameters(layer: LayerInspection) -> int:
    kernel = [int(side) for side in layer.kind.removeprefix("conv ").split("x") if side.isdigit()]
    return layer.rank * (layer.in_features * math.prod(kernel) + layer.out_features)


def _locate(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The LoRA, and what the record of its run says."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no LoRA and no run at {path}: give a .safetensors file, or a folder of "
            "peft's or of a run"
        )
    if not os.path.isdir(path):
        record = _record(path.parent)
        own = record is not None and record["export"]["file"] == path.name
        return path, _run_facts(record) if own and record is not None else None
    if record := _record(path):
        return path / record["export"]["file"], _run_facts(record)
    if (path / RUN_STATE).is_file():
        raise ValueError(
            f"{path} holds a run that is not finished: go on with `cntlora train --resume`"
        )
    files = [file for file in sorted(path.glob("*.safetensors")) if file.name != RUN_STATE]
    if len(files) > 1:
        raise ValueError(f"{path} holds several files: name one of {[f.name for f in files]}")
    is_adapter = files and files[0].name == "adapter_model.safetensors"
    return (files[0], None) if files and not is_adapter else (path, None)


def _record(folder: Path) -> dict[str, Any] | None:
    file = folder / RUN_RECORD
    if not file.is_file():
        return None
    try:
        record = read_json_object(file)
        name = record["export"]["file"]
        if Path(name).name != name:
            return None  # it would lead out of the folder
        _run_facts(record)
        return record
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # another program's


def _run_facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a run's record says; raises KeyError, TypeError and such where it is none."""
    export, seconds = record["export"], record.get("seconds") or {}
    ranks, error = export.get("trained_ranks") or {}, export.get("relative_error")
    return {
        "model": record.get("model", {}).get("source"),
        "prompts": record.get("prompts"),
        "steps": len(record.get("history", [])),
        "seconds": {str(stage): float(value) for stage, value in seconds.items()},
        "trained_ranks": {str(name): int(rank) for name, rank in ranks.items()},
        "relative_error": None if error is None else float(error),
        "notes": record.get("notes", []),
    }


def _base_model(contents: LoRAContents) -> str | None:
    metadata = contents.metadata
    named = [
        text
        for key in ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
        if (text := metadata.get(key)) and text != "None"
    ]
    for config in contents.configs.values():
        if text := config.get("base_model_name_or_path"):
            named.append(str(text))
    if named:
        return ", ".join(dict.fromkeys(named))
    for name, layer in contents.layers.items():
        if name.endswith(("attn2.to_k", "attn2_to_k")):
            width = layer.down.shape[1]
            found = _CROSS_ATTENTION_WIDTHS.get(width, f"a text width of {width}")
            return f"{found} (by its shapes; the file does not say)"
    return None


def _method(contents: LoRAContents) -> str | None:
    metadata = contents.metadata
    if method := metadata.get("cntlora.method"):
        return method
    for config in contents.configs.values():
        if "init_lora_weights" in config:
            init = config["init_lora_weights"]
            plain = {"True": "plain LoRA (kaiming)", "False": "initialisation given"}
            name = plain.get(str(init), init)
            more = [k for k in ("use_dora", "use_rslora") if config.get(k)]
            return ", ".join([f"peft: {name}", *more])
    return metadata.get("ss_network_module")


def _settings(contents: LoRAContents) -> dict[str, Any]:
    metadata = contents.metadata
    settings: dict[str, Any] = {
        key: metadata[f"ss_{key}"]
        for key in _TRAINING_FACTS
        if metadata.get(f"ss_{key}") not in (None, "None")
    }
    for component, config in contents.configs.items():
        prefix = f"{component}." if component else ""
        for key in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora"):
            if config.get(key):
                settings[prefix + key] = config[key]
    try:
        return settings | json_object(metadata.get("cntlora.settings", "{}"))
    except ValueError:
        return settings
