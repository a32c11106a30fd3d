"""The numbers of a LoRA file: ranks, scales, norms and spectra of every attachment point.

The delta of a layer is never built: its singular values are those of a small core, from the QR of
both factors (`lora_algebra.singular_values`). Of a convolution they are those of its kernel as a
matrix (out, in * kh * kw).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from cntlora_core.inspection.base_weights import base_weight_norms
from cntlora_core.inspection.origin import base_model_of, method_of, settings_of
from cntlora_core.lora_file.algebra import LoRALayer, singular_values
from cntlora_core.lora_file.contents import read_contents
from cntlora_core.lora_file.families import TEXT_ENCODER, UNET
from cntlora_core.lora_file.find_lora import find_lora
from cntlora_core.runtime.reading import user_path
from cntlora_core.runtime.thread_pool import map_in_threads

TOP_VALUES = 8
"""How many singular values of a layer go into a JSON description."""


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
    found, run = find_lora(user_path(path))
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
        base_model=base_model_of(contents),
        method=method_of(contents),
        settings=settings_of(contents),
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
