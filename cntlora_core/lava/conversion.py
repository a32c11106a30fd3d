"""Saving a LAVA adapter so that it fits the stock base, whose weight its start was taken out of."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from cntlora_core.adapter import anchored
from cntlora_core.conversion import ConversionReport
from cntlora_core.files import require_writable_folder, save_safetensors_atomic
from cntlora_core.lava import functional
from cntlora_core.lava.config import LavaConfig
from cntlora_core.lava.cp import decompose
from cntlora_core.lava.factors import LavaFactors, LavaPlan, difference
from cntlora_core.lava.inject import lava_layers, snapshot
from cntlora_core.lora_algebra import alpha_for
from cntlora_core.lora_names import PEFT_PREFIX
from cntlora_core.lora_reading import PEFT_WEIGHTS


def save_converted(
    model: PeftModel,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    compress: bool = False,
) -> ConversionReport:
    """Save a trained LAVA adapter, in peft's layout, so that it fits the stock base model.

    With ``preserve_output`` the model holds ``W - s D0``, and the file gets ``s (D - D0)``: the
    terms of both, exact at twice the rank, or brought back to the trained rank.

    Args:
        model: What :func:`cntlora_core.lava.get_lava_model` gave, in the same process.
        folder: Gets adapter_config.json and adapter_model.safetensors.
        adapter_name: Which adapter.
        compress: Bring each module back to its trained rank: for a matrix the best approximation,
            for a convolution one by alternating least squares; the report has the error.

    Raises:
        ValueError: if the model keeps no start for this adapter.
        OSError: as :func:`cntlora_core.files.atomic_write`.
    """
    plan = getattr(model, "lava_plans", {}).get(adapter_name)
    if not isinstance(plan, LavaPlan):
        raise ValueError(
            f"this model keeps no start of adapter {adapter_name!r}, so that it cannot be taken "
            "out: it was not initialised in this process. A plain start needs no conversion: use "
            "save_pretrained"
        )
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    config = copy.deepcopy(model.peft_config[adapter_name])
    assert isinstance(config, LavaConfig)
    trained_ranks, ranks, alphas = {}, {}, {}
    lost = size = 0.0
    for name, layer in lava_layers(model, adapter_name).items():
        now = snapshot(layer, adapter_name)
        stored, exact = now, now
        if plan.rewrites_base and plan.factors[name].v.any():
            stored = exact = difference(now, plan.factors[name])
            if compress:
                stored, error = brought_back(exact, now.rank)
                lost += (error * _norm(exact)) ** 2
        size += _norm(exact) ** 2
        trained_ranks[name], ranks[name] = now.rank, stored.rank
        alphas[name] = alpha_for(stored.scaling, stored.rank)
        for key, factor in stored.named().items():
            tensors[f"{PEFT_PREFIX}{name}.lava_{key}"] = factor.contiguous()
    config.rank_pattern = {anchored(name): rank for name, rank in ranks.items()}
    config.alpha_pattern = {anchored(name): alpha for name, alpha in alphas.items()}
    config.inference_mode = True
    folder = require_writable_folder(folder)
    save_safetensors_atomic(tensors, folder / PEFT_WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))
    return ConversionReport(folder, ranks, trained_ranks, (lost / size) ** 0.5 if size else 0.0)


def brought_back(factors: LavaFactors, rank: int) -> tuple[LavaFactors, float]:
    """The same change with fewer terms, and its relative error."""
    right = functional.delta(torch.eye(factors.rank), factors.v, factors.spatial)
    found = decompose(factors.u, right, rank)
    u, v, *spatial = (factor.float() for factor in found.factors)
    sizes = v.norm(dim=0).clamp_min(1e-30).sqrt()
    return LavaFactors(u * sizes, v / sizes, tuple(spatial), factors.scaling), found.error


def _norm(factors: LavaFactors) -> float:
    """||delta||, from the factors, in float64: the sum over all products of their Gram matrices."""
    grams = [factor.double().T @ factor.double() for factor in factors.named().values()]
    return abs(factors.scaling) * float(torch.stack(grams).prod(0).sum().clamp_min(0).sqrt())
