"""Controls: initialisations that keep one half of another one, its directions or its norms."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cntlora_core.adapter.inject import AdapterPlan
    from cntlora_core.closed_form.factorization import Factors
    from cntlora_core.diffusion.stages import Initialization

RANDOM_DIRECTIONS, PLAIN_NORMS = "random-directions", "plain-norms"
CONTROLS = (RANDOM_DIRECTIONS, PLAIN_NORMS)
"""random-directions: the initialisation's norms along random orthonormal directions.
plain-norms: the initialisation's down directions, as long as plain LoRA's; the up matrix is 0."""

LORA_ROW_NORM = 1 / math.sqrt(3)
"""Root mean square norm of a row of plain LoRA's down matrix, uniform within 1 / sqrt(d_in)."""


def controlled(initialization: Initialization, control: str, seed: int) -> Initialization:
    """The control of an initialisation.

    Args:
        initialization: The initialisation, of a LoRA.
        control: One of :data:`CONTROLS`.
        seed: Seed of the random directions.

    Raises:
        ValueError: for a name that is no control, or an adapter that is no LoRA.
    """
    from cntlora_core.adapter.inject import AdapterPlan

    if control not in CONTROLS:
        raise ValueError(f"there is no control {control!r}; there are {', '.join(CONTROLS)}")
    if not isinstance(initialization.plan, AdapterPlan):
        raise ValueError(f"the control {control!r} is made of a LoRA: use adapter='lora'")
    plan: AdapterPlan = initialization.plan
    if control == RANDOM_DIRECTIONS:
        from cntlora_core.closed_form.factorization import seeded_generator

        factors = {
            name: random_directions(own, seeded_generator(seed, number))
            for number, (name, own) in enumerate(plan.factors.items())
        }
        return dataclasses.replace(initialization, plan=dataclasses.replace(plan, factors=factors))
    factors = {name: plain_norms(own) for name, own in plan.factors.items()}
    return dataclasses.replace(
        initialization, plan=dataclasses.replace(plan, factors=factors, rewrites_base=False)
    )


def random_directions(factors: Factors, generator: torch.Generator) -> Factors:
    """Factors of the same row norms (down) and column norms (up), each set orthonormal at random.

    Where there are more ranks than features the directions are as near to orthonormal as they get:
    of length 1, not orthogonal.
    """
    down = _orthonormal(factors.down, generator) * factors.down.norm(dim=1, keepdim=True)
    up = _orthonormal(factors.up.T, generator).T * factors.up.norm(dim=0, keepdim=True)
    return dataclasses.replace(factors, down=down.contiguous(), up=up.contiguous())


def plain_norms(factors: Factors) -> Factors:
    """Factors of the same down directions, with rows as long as plain LoRA's, and up 0."""
    norms = factors.down.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return dataclasses.replace(
        factors, down=factors.down / norms * LORA_ROW_NORM, up=torch.zeros_like(factors.up)
    )


def _orthonormal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As many and as wide rows, of length 1, orthogonal to each other where width allows."""
    count, width = like.shape
    normal = torch.randn(width, count, generator=generator, dtype=torch.float64)
    if count > width:
        return (normal / normal.norm(dim=0)).T.float()
    basis, triangle = torch.linalg.qr(normal)
    return (basis * triangle.diagonal().sign()).T.float()
