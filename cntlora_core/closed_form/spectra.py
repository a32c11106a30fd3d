"""Symmetric eigenproblems and thin SVDs: the delta of one attachment point as a Spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cntlora_core.activations.moments import Moment
from cntlora_core.config import Solver

RELATIVE_CUTOFF = 1e-6
"""Singular values of a float32 product below this fraction of the largest are rounding."""


_SMALL_WIDTH = 512
_FEW = 0.1
_OVERSAMPLING = 64
_ROUNDS = 8
_SKETCH = 128
_GRAM_CUTOFF = 1e-4
_SAFETY = 2.0


@dataclass(frozen=True)
class PrincipalSubspace:
    """The leading eigenpairs of a normalised second moment.

    Attributes:
        vectors: (d, k) float32, orthonormal columns, by descending eigenvalue.
        values: (k,) float64, eigenvalues of ``C / (trace(C) / d)``: their mean over all d is 1.
        error: About the angle, in radians, between the vectors and the true eigenvectors, root mean
            square over the vectors; 0 where the full eigenproblem was solved in float64.
    """

    vectors: Tensor
    values: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    def leading(self, k: int) -> PrincipalSubspace:
        return PrincipalSubspace(self.vectors[:, :k], self.values[:k], self.error)


def principal_subspace(
    moment: Moment, k: int | None = None, *, solver: Solver = "fast"
) -> PrincipalSubspace:
    """The at most ``k`` leading eigenpairs that the data supports.

    Fewer than ``k`` come back where the moment's own rank is smaller: there were fewer rows than
    that, or they were dependent. A moment of no rows, or of zeros, gives an empty subspace.
    Solved on the CPU, wherever the moment is. An eigenvalue counts as the data's if it is above
    what rounding can make: twice what was measured of the sum, what the matrix's data type rounds,
    and the solver's own error, ``sqrt(d)`` times the precision that it worked in.

    Args:
        moment: Of the inputs of one or several attachment points.
        k: How many; None for all.
        solver: ``exact`` solves the full eigenproblem in float64. ``fast`` does so up to a width of
            512; beyond that in the precision that the moment was summed in, and where ``k`` is at
            most about a fifteenth of the width by subspace iteration.
    """
    matrix = moment.matrix.cpu()  # MPS has no float64
    width = moment.width
    mean = matrix.diagonal().double().mean()
    limit = min(width if k is None else k, width, moment.count)
    if limit == 0 or not mean > 0:
        return PrincipalSubspace(
            matrix.new_zeros(width, 0, dtype=torch.float32), matrix.new_zeros(0).double()
        )
    rounding, stored = moment.rounding / float(mean), torch.finfo(matrix.dtype).eps
    if solver == "exact" or width <= _SMALL_WIDTH:
        matrix = matrix.double() / mean
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors, error = values.flip(0)[:limit], vectors.flip(1)[:, :limit], 0.0
    else:
        matrix = matrix / mean.to(matrix.dtype)
        found = _all_of_few(matrix) or _few_of_many(matrix, limit) or _all_of_many(matrix, limit)
        values, vectors, error = found.values[:limit], found.vectors[:, :limit], found.error(limit)
    values, vectors = values.double(), vectors.float()
    solved = width**0.5 * torch.finfo(matrix.dtype).eps
    cutoff = _SAFETY * rounding + (stored + solved) * values[0]
    kept = int((values > cutoff).sum())
    return PrincipalSubspace(vectors[:, :kept], values[:kept], error)


@dataclass(frozen=True)
class _RitzPairs:
    """What a subspace holds of a matrix's eigenpairs (Rayleigh-Ritz), and how far it is off.

    Attributes:
        values: (q,), descending.
        vectors: (d, q), orthonormal columns.
        residuals: (q,), ``|C v - lam v|``.
        rest: An upper bound of the eigenvalues outside the subspace, about.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    rest: float

    def error(self, k: int) -> float:
        """The angle between the ``k`` leading vectors and the true ones, root mean square.

        To first order a true eigenvector leaves the subspace by ``(lam - C)^-1`` of its residual,
        and C is at most ``rest`` there.
        """
        real = self.values[:k].double() > RELATIVE_CUTOFF * float(self.values[0])
        gaps = (self.values[:k].double()[real] - self.rest).clamp_min(1e-12)
        angles = (self.residuals[:k].double()[real] / gaps).clamp_max(1.0)
        return float(angles.square().mean().sqrt())


def _rayleigh_ritz(basis: Tensor, image: Tensor, rest: float | None) -> _RitzPairs:
    """Of a matrix's ``image`` of an orthonormal ``basis``; ``rest`` is the last value if None."""
    values, rotation = torch.linalg.eigh(basis.T @ image)
    values, rotation = values.flip(0), rotation.flip(1)
    vectors = basis @ rotation
    residuals = (image @ rotation - vectors * values).norm(dim=0)
    return _RitzPairs(values, vectors, residuals, float(values[-1]) if rest is None else rest)


def _random_columns(matrix: Tensor, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[0], count, generator=generator).to(matrix)


def _all_of_few(matrix: Tensor) -> _RitzPairs | None:
    """All eigenpairs that are no rounding, where a sketch ``C @ random`` has them all; else None.

    As where all samples have one text: its tokens are far fewer than the features. The sketch's
    range is all of the matrix's if nothing of its trace is left out.
    """
    basis = torch.linalg.qr(matrix @ _random_columns(matrix, _SKETCH)).Q
    image = matrix @ basis
    inside = (basis * image).sum(0)
    left_out = matrix.diagonal().double().sum() - inside.double().sum()
    if left_out > RELATIVE_CUTOFF * inside.max():
        return None
    return _rayleigh_ritz(basis, image, rest=0.0)


def _few_of_many(matrix: Tensor, k: int) -> _RitzPairs | None:
    """About the ``k`` leading eigenpairs; None where the full eigenproblem is as fast.

    Subspace iteration (arXiv 0909.4061, algorithm 4.4) with a Rayleigh-Ritz step, as
    ``torch.svd_lowrank`` does it, which draws from the global generator.
    """
    columns = k + max(_OVERSAMPLING, k // 2)
    if columns > _FEW * matrix.shape[0]:
        return None
    image = matrix @ _random_columns(matrix, columns)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(image).Q
        image = matrix @ basis
    return _rayleigh_ritz(basis, image, rest=None)


def _all_of_many(matrix: Tensor, k: int) -> _RitzPairs:
    """The ``k`` leading of all eigenpairs, as well as the matrix's precision allows."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)[:, :k]
    residuals = (matrix @ vectors - vectors * values[:k]).norm(dim=0)
    return _RitzPairs(values[:k], vectors, residuals, float(values[k]) if k < len(values) else 0.0)


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


def thin_spectrum(
    matrix: Tensor, basis: Tensor, gram: Tensor | None = None, floor: float = 0.0
) -> Spectrum:
    """The spectrum of ``matrix @ basis.T``, without singular values that are rounding.

    Args:
        matrix: (d_out, m).
        basis: (d_in, m), orthonormal columns.
        gram: (m, m) float64, ``matrix.T @ matrix``, where it is known.
        floor: Values up to this are rounding, as are those below 1e-6 of the largest.
    """
    if matrix.shape[0] >= matrix.shape[1] > 0:
        # Half the time of an SVD. Left vectors of values near 1e-8 of the largest would not be
        # orthonormal.
        squares, right = torch.linalg.eigh(gram_matrix(matrix) if gram is None else gram)
        values, right = squares.flip(0).clamp_min(0).sqrt(), right.flip(1)
        if values[-1] > max(_GRAM_CUTOFF * float(values[0]), floor):
            left = (matrix.double() @ right).div_(values).to(matrix.dtype)
            return Spectrum(left, values.to(matrix.dtype), right.to(matrix.dtype), basis)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = int(_is_real(values, floor).sum())
    return Spectrum(left[:, :kept], values[:kept], right[:kept].T, basis)


def gram_matrix(matrix: Tensor) -> Tensor:
    """``M.T @ M``, float64."""
    double = matrix.double()
    return double.T @ double


def _is_real(values: Tensor, floor: float) -> Tensor:
    return values > (RELATIVE_CUTOFF * values[:1]).clamp_min(floor)


def singular_values(gram: Tensor, floor: float = 0.0) -> Tensor:
    """The singular values of M, descending, those left out that `thin_spectrum` leaves out.

    Args:
        gram: (m, m) float64, ``M.T @ M``. What is below 1e-8 of the largest value is rounding.
        floor: As there.
    """
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    return values[_is_real(values, floor)]
