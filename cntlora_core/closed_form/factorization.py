"""From a spectrum, a rank and a scaling to factors; the only place that divides by the scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cntlora_core.closed_form.spectra import Spectrum
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.runtime.seeds import torch_seed


@dataclass(frozen=True)
class Factors:
    """The initialisation of one adapter.

    Attributes:
        down: A, (r, d_in) float32.
        up: B, (d_out, r) float32.
        scaling: alpha / r; the delta is ``scaling * up @ down``.
        filled: How many of the r directions the delta does not have, since the data does not
            support them or nothing changes there; they are initialised as an ordinary LoRA is:
            down Kaiming-uniform, up zero.
    """

    down: Tensor
    up: Tensor
    scaling: float
    filled: int = 0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def named(self) -> dict[str, Tensor]:
        """The two matrices by their names."""
        return {"down": self.down, "up": self.up}

    @classmethod
    def of(cls, named: Mapping[str, Tensor], **numbers: Any) -> Factors:
        """Inverse of :meth:`named`, with scaling and so on."""
        return cls(**named, **numbers)

    def delta(self) -> Tensor:
        """(d_out, d_in)."""
        return self.scaling * (self.up @ self.down)


def factorize(
    spectrum: Spectrum,
    rank: int,
    scaling: float,
    config: CNTLoRAConfig,
    generator: torch.Generator | None = None,
) -> Factors:
    """Factors whose scaled product is the best approximation of the delta at ``rank``.

    Args:
        spectrum: The delta, of any rank.
        rank: Rows of the down matrix; where the spectrum has fewer, the rest is filled.
        scaling: alpha / r.
        config: Factorization and split.
        generator: For the filled directions; seeded from ``config.seed`` if left out.
    """
    kept = spectrum.truncate(rank)
    if config.factorization == "svd":
        up = kept.left * kept.values.pow(config.split)
        down = (kept.basis @ (kept.coordinates * kept.values.pow(1.0 - config.split))).T
        up, down = up / math.sqrt(scaling), down / math.sqrt(scaling)
    else:
        # U is orthonormal, so the QR of U S Q.T is that of the small factor S Q.T, rotated by U.
        small_q, small_r = torch.linalg.qr(kept.values[:, None] * kept.coordinates.T)
        up, down = kept.left @ small_q, small_r @ kept.basis.T / scaling
    filled = rank - kept.rank
    if filled:
        fresh_down, fresh_up = plain_factors(
            filled, down.shape[1], up.shape[0], generator or seeded_generator(config.seed)
        )
        down = torch.cat([down, fresh_down.to(down)])
        up = torch.cat([up, fresh_up.to(up)], dim=1)
    return Factors(down.contiguous(), up.contiguous(), scaling, filled)


def plain_factors(
    rank: int, d_in: int, d_out: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """LoRA's own initialisation (arXiv 2106.09685, as in peft): down Kaiming-uniform, up zero."""
    bound = 1.0 / math.sqrt(d_in)  # kaiming_uniform_ with a = sqrt(5)
    down = torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
    return down, torch.zeros(d_out, rank)


def seeded_generator(seed: int, stream: int = 0) -> torch.Generator:
    """A generator of its own for each ``stream`` of a seed of any size, on the CPU."""
    return torch.Generator().manual_seed(torch_seed(seed * 1_000_003 + stream))
