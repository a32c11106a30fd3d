"""What a LAVA adapter is initialised from, decided before any module is wrapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cntlora_core.initialization.plan import Plan
from cntlora_core.lava import functional


@dataclass(frozen=True, eq=False)
class LavaFactors:
    """The initialisation of one adapter, or a snapshot of it.

    Attributes:
        u: (c_out, R) float32.
        v: (c_in / groups, R) float32.
        spatial: (kh, R) and (kw, R); (k, R) for one dimension; nothing for a matrix.
        scaling: alpha / R.
        filled: How many of the R terms the data did not support; they are initialised as plain
            ones.
        error: Frobenius error of the delta against the closed form's, relative to that; 0 for a
            matrix and for a plain initialisation.
        size: Frobenius norm of the closed form's delta.
    """

    u: Tensor
    v: Tensor
    spatial: tuple[Tensor, ...]
    scaling: float
    filled: int = 0
    error: float = 0.0
    size: float = 0.0

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    def named(self) -> dict[str, Tensor]:
        """The factors by their names, in the order of the weight's dimensions."""
        factors = (self.u, self.v, *self.spatial)
        return dict(zip(functional.factor_names(len(factors)), factors, strict=True))

    @classmethod
    def of(cls, named: Mapping[str, Tensor], **numbers: Any) -> LavaFactors:
        """Inverse of :meth:`named`, with scaling and so on."""
        return cls(named["U"], named["V"], tuple(named[k] for k in "YX" if k in named), **numbers)

    def down(self) -> Tensor:
        """What U is multiplied by: (R, c_in / groups * kh * kw), ``delta = scaling * U @ down``."""
        right = self.v
        for factor in self.spatial:
            right = right[..., None, :] * factor
        return right.flatten(0, -2).T

    def delta(self) -> Tensor:
        """The change of weight, (c_out, c_in / groups, kh, kw)."""
        return self.scaling * functional.delta(self.u, self.v, self.spatial)


@dataclass(frozen=True)
class LavaPlan(Plan[LavaFactors]):
    """The plan of LAVA adapters; a base is rewritten only where a delta is not zero."""

    factors_type = LavaFactors

    @property
    def relative_error(self) -> float:
        """Of all deltas together, against those of the closed form."""
        size = sum(f.size**2 for f in self.factors.values())
        lost = sum((f.error * f.size) ** 2 for f in self.factors.values())
        return (lost / size) ** 0.5 if size else 0.0


_SHORT = 0.1  # its square is what the rows of U are off from orthonormal, at the most


def plain_factors(
    weight_shape: Sequence[int], rank: int, scaling: float, generator: torch.Generator
) -> LavaFactors:
    """Plain initialisation: U orthonormal, V zero, Y and X random columns of length 1."""
    c_out, c_in, *kernel = weight_shape
    spatial = tuple(
        torch.nn.functional.normalize(torch.randn(n, rank, generator=generator), dim=0)
        for n in kernel
    )
    u = orthonormal_columns(c_out, rank, generator)
    return LavaFactors(u, torch.zeros(c_in, rank), spatial, scaling)


def orthonormal_columns(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns; where there are more columns than rows, orthonormal rows."""
    normal = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    q = torch.linalg.qr(normal).Q
    return q if rows >= columns else q.T.contiguous()


def fill_rank(factors: LavaFactors, rank: int, generator: torch.Generator) -> LavaFactors:
    """The same delta with plain terms added up to a rank, their U orthonormal to what is there.

    The scaling stays; the added terms are counted in ``filled``. Those beyond the rows of U, which
    can be orthonormal to nothing, have short columns there: the rows stay nearly orthonormal.
    """
    more = rank - factors.rank
    if more <= 0:
        return factors
    shape = [f.shape[0] for f in factors.named().values()]
    plain = plain_factors(shape, more, factors.scaling, generator)
    u = plain.u
    if factors.rank:
        known = torch.linalg.qr(factors.u).Q
        rest = torch.randn(shape[0], more, generator=generator)
        rest -= known @ (known.T @ rest)
        free = max(0, min(more, shape[0] - factors.rank))
        u = torch.linalg.qr(rest - known @ (known.T @ rest)).Q[:, :free]
        u = torch.cat([u, _SHORT * plain.u[:, free:]], dim=1)
    return LavaFactors(
        torch.cat([factors.u, u], dim=1),
        torch.cat([factors.v, plain.v], dim=1),
        tuple(torch.cat(pair, dim=1) for pair in zip(factors.spatial, plain.spatial, strict=True)),
        factors.scaling,
        factors.filled + more,
        factors.error,
        factors.size,
    )


def difference(trained: LavaFactors, initial: LavaFactors) -> LavaFactors:
    """``trained - initial``, exact: the terms of both, those of ``initial`` with the sign turned.

    The scaling is kept, so that alpha grows with the rank.

    Raises:
        ValueError: where the two differ in scaling.
    """
    if abs(trained.scaling - initial.scaling) > 1e-6 * abs(initial.scaling):
        raise ValueError(
            "trained and initial adapter differ in scaling: "
            f"{trained.scaling:g} against {initial.scaling:g}"
        )
    return LavaFactors(
        torch.cat([trained.u, initial.u], dim=1),
        torch.cat([trained.v, -initial.v], dim=1),
        tuple(torch.cat(p, dim=1) for p in zip(trained.spatial, initial.spatial, strict=True)),
        initial.scaling,
    )
