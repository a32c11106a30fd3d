"""From a trained model to a LoRA file that is right on the stock checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cntlora_core.adapter import AdapterPlan
from cntlora_core.diffusion.settings import OutputSettings, torch_dtype
from cntlora_core.lora_algebra import alpha_for, balance, compress, total_relative_error
from cntlora_core.lora_file import (
    LoRALayer,
    LoRALayers,
    collect_adapter,
    subtract_initial_layers,
    write_lora_file,
)
from cntlora_core.parallel import map_in_threads


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file (a folder in peft's layout).
        ranks: Rank of each layer in the file, by canonical name.
        trained_ranks: Rank of each layer while it was trained.
        relative_error: Frobenius error of the whole adapter, from truncation and from rounding to
            the precision of the file; 0 for an exact file.
    """

    path: Path
    ranks: dict[str, int]
    trained_ranks: dict[str, int]
    relative_error: float


def trained_layers(
    unet: nn.Module, text_encoder: nn.Module, plan: AdapterPlan
) -> tuple[LoRALayers, dict[str, int]]:
    """What the adapters add to the stock checkpoint, exactly, and the ranks that were trained.

    Where the frozen weight became ``W - s B0 A0`` the start is subtracted, which doubles ranks.
    """
    layers = collect_adapter(unet, prefix="unet")
    if plan.under("text_encoder.").factors:
        layers |= collect_adapter(text_encoder, prefix="text_encoder")
    ranks = {name: layer.rank for name, layer in layers.items()}
    if plan.rewrites_base:
        layers = subtract_initial_layers(layers, _initial_layers(plan))
    return layers, ranks


def export_lora(
    unet: nn.Module,
    text_encoder: nn.Module,
    plan: AdapterPlan,
    path: Path,
    settings: OutputSettings,
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write the trained adapter in the layout and precision that were asked for.

    For a file in half precision, factors that nearly cancel are factored anew first.
    """
    exact, trained_ranks = trained_layers(unet, text_encoder, plan)
    layers = exact
    dtype = torch_dtype(settings.file_precision)
    names = list(layers)
    if plan.rewrites_base and (settings.compress or dtype != torch.float32):

        def refactored(name: str) -> LoRALayer:
            layer = balance(exact[name])
            return compress(layer, trained_ranks[name])[0] if settings.compress else layer

        layers = dict(zip(names, map_in_threads(refactored, names, progress), strict=True))
    error = 0.0
    if dtype != torch.float32 or settings.compress:
        stored = {
            name: dataclasses.replace(
                layer,
                down=layer.down.to(dtype).float(),
                up=layer.up.to(dtype).float(),
            )
            for name, layer in layers.items()
        }
        error = total_relative_error(stored, exact)
    written = write_lora_file(path, layers, layout=settings.layout, metadata=metadata, dtype=dtype)
    return ExportReport(
        written, {name: layer.rank for name, layer in layers.items()}, trained_ranks, error
    )


def _initial_layers(plan: AdapterPlan) -> LoRALayers:
    return {
        name.replace("text_encoder.text_model.", "text_encoder."): LoRALayer(
            down=f.down, up=f.up, alpha=alpha_for(f.scaling, f.rank)
        )
        for name, f in plan.factors.items()
    }
