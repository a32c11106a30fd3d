"""LAVA adapters whose initialisation was taken out of the base weights, for the stock base."""

from __future__ import annotations

import torch
from torch import Tensor

from cntlora_core.adapter.record import Converted
from cntlora_core.lava import functional
from cntlora_core.lava.cp import decompose
from cntlora_core.lava.factors import LavaFactors, LavaPlan, difference
from cntlora_core.lora_file.names import PEFT_PREFIX

__all__ = ["brought_back", "subtracted_lava"]


def subtracted_lava(tensors: dict[str, Tensor], plan: LavaPlan, compress: bool) -> Converted:
    """The saved tensors of an adapter, with the initial one subtracted from them.

    The base holds ``W - s D0``, and the file gets ``s (D - D0)``: the terms of both, exact at twice
    the rank, or brought back to the trained rank.

    Raises:
        KeyError: if the plan has a layer that the tensors lack.
    """
    tensors = dict(tensors)
    trained_ranks, ranks, scalings = {}, {}, {}
    lost = size = 0.0
    for name, initial in plan.factors.items():
        prefix = f"{PEFT_PREFIX}{name}.lava_"
        u, v, *spatial = (tensors[prefix + key].float() for key in initial.named())
        stored = exact = now = LavaFactors(u, v, tuple(spatial), initial.scaling)
        if initial.v.any():
            stored = exact = difference(now, initial)
            if compress:
                stored, error = brought_back(exact, now.rank)
                lost += (error * _norm(exact)) ** 2
        size += _norm(exact) ** 2
        trained_ranks[name], ranks[name] = now.rank, stored.rank
        scalings[name] = stored.scaling
        for key, factor in stored.named().items():
            tensors[prefix + key] = factor.to(tensors[prefix + key].dtype)
    error = (lost / size) ** 0.5 if size else 0.0
    return Converted(tensors, scalings, ranks, trained_ranks, error)


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
