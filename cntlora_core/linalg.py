"""Symmetric eigenproblems and thin SVDs: the delta of one attachment point as a Spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cntlora_core.moments import Moment

RELATIVE_CUTOFF = 1e-6
"""Eigenvalues below this fraction of the largest are taken for rounding of a float32 sum."""


@dataclass(frozen=True)
class PrincipalSubspace:
    """The leading eigenpairs of a normalised second moment.

    Attributes:
        vectors: (d, k) float32, orthonormal columns, by descending eigenvalue.
        values: (k,) float64, eigenvalues of ``C / (trace(C) / d)``: their mean over all d is 1.
    """

    vectors: Tensor
    values: Tensor

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    def leading(self, k: int) -> PrincipalSubspace:
        return PrincipalSubspace(self.vectors[:, :k], self.values[:k])


def principal_subspace(moment: Moment, k: int | None = None) -> PrincipalSubspace:
    """The at most ``k`` leading eigenpairs that the data supports.

    Fewer than ``k`` come back where the moment's own rank is smaller: there were fewer rows than
    that, or they were dependent. A moment of no rows, or of zeros, gives an empty subspace.
    Solved in float64 on the CPU, wherever the moment is.
    """
    matrix = moment.matrix.cpu().to(torch.float64)  # MPS has no float64
    width = moment.width
    mean = matrix.diagonal().mean()
    limit = min(width if k is None else k, width, moment.count)
    if limit == 0 or not mean > 0:
        return PrincipalSubspace(
            matrix.new_zeros(width, 0, dtype=torch.float32), matrix.new_zeros(0)
        )
    values, vectors = torch.linalg.eigh(matrix / mean)
    values, vectors = values.flip(0)[:limit], vectors.flip(1)[:, :limit]
    kept = int((values > RELATIVE_CUTOFF * values[0]).sum())
    return PrincipalSubspace(vectors[:, :kept].float(), values[:kept])


@dataclass(frozen=True)
class Spectrum:
    """A delta ``U diag(S) (P Q).T`` of rank k, ready to be truncated.

    Attributes:
        left: U, (d_out, k), orthonormal columns.
        values: S, (k,), descending.
        coordinates: Q, (m, k): the right singular vectors within the basis.
        basis: P, (d_in, m), orthonormal columns: the subspace that the delta acts on.
    """

    left: Tensor
    values: Tensor
    coordinates: Tensor
    basis: Tensor

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    def truncate(self, rank: int) -> Spectrum:
        """The best approximation of at most ``rank``."""
        return Spectrum(
            self.left[:, :rank], self.values[:rank], self.coordinates[:, :rank], self.basis
        )

    def delta(self) -> Tensor:
        """The matrix itself, (d_out, d_in)."""
        return (self.left * self.values) @ (self.basis @ self.coordinates).T


def thin_spectrum(matrix: Tensor, basis: Tensor) -> Spectrum:
    """The spectrum of ``matrix @ basis.T``.

    Args:
        matrix: (d_out, m).
        basis: (d_in, m), orthonormal columns.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((values > RELATIVE_CUTOFF * values[:1]).sum()) if values.numel() else 0
    return Spectrum(left[:, :kept], values[:kept], right[:kept].T, basis)
