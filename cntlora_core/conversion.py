"""Saving an adapter whose start was taken out of the base weight so that it fits the stock one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from cntlora_core.adapter import alpha_of, anchored
from cntlora_core.factorization import Factors
from cntlora_core.files import save_safetensors_atomic, write_json_atomic
from cntlora_core.lora_algebra import (
    LoRALayer,
    LoRALayers,
    alpha_for,
    compress_layers,
    subtract_initial_layers,
    total_relative_error,
)
from cntlora_core.lora_names import PEFT_PREFIX
from cntlora_core.lora_reading import PEFT_CONFIG, PEFT_WEIGHTS
from cntlora_core.plan import AdapterPlan

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class ConversionReport:
    """What was saved.

    Attributes:
        path: The folder, for ``PeftModel.from_pretrained`` on the stock base.
        ranks: Rank of each layer as saved.
        trained_ranks: Rank of each layer while it was trained.
        relative_error: Frobenius error of the whole adapter from truncation; 0 for an exact one.
    """

    path: Path
    ranks: dict[str, int]
    trained_ranks: dict[str, int]
    relative_error: float


def save_converted(
    model: PeftModel,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    compress: bool = False,
) -> ConversionReport:
    """Save a trained adapter, in peft's layout, so that it fits the stock base model.

    With ``preserve_output`` the model holds ``W - s B0 A0``, and the file gets what training has
    added to the stock weight: ``s (B A - B0 A0) = s [B, -B0] @ [A; A0]``, exact at twice the rank,
    or cut back to the trained ranks. Without it this is peft's ``save_pretrained``. In a process
    group, call it on one process.

    Args:
        model: What :func:`get_cntlora_model` or :func:`initialize_lora_cntlora_weights` gave, in
            the same process; it stays as it is.
        folder: Gets adapter_config.json and adapter_model.safetensors.
        adapter_name: Which adapter.
        compress: Truncate to the trained ranks (the best approximation of each layer).

    Raises:
        ValueError: if the model keeps no start for this adapter.
        OSError: as :func:`cntlora_core.files.atomic_write`.
    """
    plan = getattr(model, "cntlora_plans", {}).get(adapter_name)
    if not isinstance(plan, AdapterPlan):
        raise ValueError(
            f"this model keeps no start of adapter {adapter_name!r}, so that it cannot be taken "
            "out: it was not initialised in this process. Save such a model before training, too, "
            "and use peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=[adapter_name])
        saved = Path(temporary) / ("" if adapter_name == "default" else adapter_name)
        config = json.loads((saved / PEFT_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(saved / PEFT_WEIGHTS)
    layers = _trained_layers(tensors, plan)
    trained_ranks = {name: layer.rank for name, layer in layers.items()}
    error = 0.0
    if plan.rewrites_base:
        exact = subtract_initial_layers(layers, _initial_layers(plan.factors, layers))
        layers = compress_layers(exact, trained_ranks)[0] if compress else exact
        error = total_relative_error(layers, exact) if compress else 0.0
        for name, layer in layers.items():
            kept = tensors[PEFT_PREFIX + name + DOWN].dtype
            tensors[PEFT_PREFIX + name + DOWN] = layer.down.to(kept)
            tensors[PEFT_PREFIX + name + UP] = layer.up.to(kept)
    config["init_lora_weights"] = True
    config["rank_pattern"] = {anchored(name): layer.rank for name, layer in layers.items()}
    config["alpha_pattern"] = {
        anchored(name): alpha_of(layer.scaling, layer.rank, config["use_rslora"])
        for name, layer in layers.items()
    }
    folder = Path(folder)
    save_safetensors_atomic(tensors, folder / PEFT_WEIGHTS, {"format": "pt"})
    write_json_atomic(folder / PEFT_CONFIG, config)
    ranks = {name: layer.rank for name, layer in layers.items()}
    return ConversionReport(folder, ranks, trained_ranks, error)


def _trained_layers(tensors: Mapping[str, Tensor], plan: AdapterPlan) -> LoRALayers:
    layers = {}
    for name, factors in plan.factors.items():
        down = tensors[PEFT_PREFIX + name + DOWN].float()
        up = tensors[PEFT_PREFIX + name + UP].float()
        layers[name] = LoRALayer(down, up, alpha_for(factors.scaling, down.shape[0]))
    return layers


def _initial_layers(factors: Mapping[str, Factors], like: LoRALayers) -> LoRALayers:
    """The start in the trained layers' own shapes: kernels, for a convolution."""
    return {
        name: LoRALayer(
            f.down.reshape(-1, *like[name].down.shape[1:]),
            f.up.reshape(f.up.shape[0], f.rank, *like[name].up.shape[2:]),
            alpha_for(f.scaling, f.rank),
        )
        for name, f in factors.items()
    }
