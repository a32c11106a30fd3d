"""Symmetric eigenproblems and thin SVDs: the delta of one attachment point as a Spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cntlora_core.moments import Moment

RELATIVE_CUTOFF = 1e-6
"""Singular values of a float32 product below this fraction of the largest are rounding."""


_SMALL_WIDTH = 512
_FEW = 0.3
_OVERSAMPLING = 64
_SKETCH = 128
_GRAM_CUTOFF = 1e-4
_SAFETY = 2.0


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


def principal_subspace(
    moment: Moment, k: int | None = None, *, exact: bool = False
) -> PrincipalSubspace:
    """The at most ``k`` leading eigenpairs that the data supports.

    Fewer than ``k`` come back where the moment's own rank is smaller: there were fewer rows than
    that, or they were dependent. A moment of no rows, or of zeros, gives an empty subspace.
    Solved on the CPU, wherever the moment is. An eigenvalue counts as the data's if it is above
    what rounding can make: twice what was measured of the sum, what the matrix's data type rounds,
    and the solver's own error, ``sqrt(d)`` times the precision that it worked in.

    A narrow moment, or a ``k`` that is no small part of its width, is a full eigenproblem: in
    float64 up to a width of 512, beyond that in the precision that the moment was summed in. Few
    pairs of a wide one are found by subspace iteration; where that does not settle, by the full
    eigenproblem. Either way ``V.T C V`` is diagonal to rounding, so that what is made of the pairs
    is right within their span, and the span misses the best one by what `subspace_iteration` says.

    Args:
        moment: Of the inputs of one or several attachment points.
        k: How many; None for all.
        exact: Always solve the full eigenproblem in float64.
    """
    matrix = moment.matrix.cpu()  # MPS has no float64
    width = moment.width
    mean = matrix.diagonal().double().mean()
    limit = min(width if k is None else k, width, moment.count)
    if limit == 0 or not mean > 0:
        return PrincipalSubspace(
            matrix.new_zeros(width, 0, dtype=torch.float32), matrix.new_zeros(0).double()
        )
    found, rounding = None, moment.rounding / float(mean)
    stored = torch.finfo(matrix.dtype).eps
    if exact or width <= _SMALL_WIDTH:
        matrix = matrix.double()
    matrix = matrix / mean.to(matrix.dtype)
    if not exact and width > _SMALL_WIDTH:
        sketch = matrix @ _random_columns(matrix, _SKETCH)
        found = _all_of_few(matrix, sketch)
        if found is None and limit + _extra_columns(limit) <= _FEW * width:
            found = subspace_iteration(matrix, limit, sketch)
    if found is None:
        values, vectors = torch.linalg.eigh(matrix)
        found = values.flip(0), vectors.flip(1)
    values, vectors = found[0][:limit].double(), found[1][:, :limit].float()
    solved = width**0.5 * torch.finfo(matrix.dtype).eps
    cutoff = _SAFETY * rounding + (stored + solved) * values[0]
    kept = int((values > cutoff).sum())
    return PrincipalSubspace(vectors[:, :kept], values[:kept])


def _random_columns(matrix: Tensor, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(matrix.shape[0], count, generator=generator).to(matrix.dtype)


def _all_of_few(matrix: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor] | None:
    """All eigenpairs that are no rounding, where a sketch ``C @ random`` has them all; else None.

    As where all samples have one text: its tokens are far fewer than the features. The sketch's
    range is all of the matrix's if nothing of its trace is left out.
    """
    basis = torch.linalg.qr(sketch).Q
    inner = basis.T @ (matrix @ basis)
    left_out = matrix.diagonal().double().sum() - inner.diagonal().double().sum()
    if left_out > RELATIVE_CUTOFF * inner.diagonal().max():
        return None
    values, rotation = torch.linalg.eigh(inner)
    return values.flip(0), basis @ rotation.flip(1)


def _extra_columns(k: int) -> int:
    return max(_OVERSAMPLING, k // 4)


def subspace_iteration(
    matrix: Tensor,
    k: int,
    sketch: Tensor | None = None,
    *,
    tolerance: float = 2e-2,
    rounds: int = 6,
) -> tuple[Tensor, Tensor] | None:
    """About the ``k`` leading eigenpairs, by randomised subspace iteration.

    With a Rayleigh-Ritz step after every round (arXiv 0909.4061, algorithms 4.4 and 5.3). It ends
    once the eigenvalues change by less than ``tolerance`` in a round, in the mean of their relative
    changes; the subspace has then long settled in its leading directions, and moves in the last
    ones, whose eigenvalues lie close together.

    Args:
        matrix: (d, d), symmetric, positive semi-definite.
        k: How many pairs.
        sketch: (d, any), ``matrix`` times random columns, if there is one already.
        tolerance: When it is done.
        rounds: At most so many.

    Returns:
        Eigenvalues (k,), descending, and eigenvectors (d, k); None if it did not settle, as where
        all eigenvalues are nearly alike.
    """
    columns = min(matrix.shape[0], k + _extra_columns(k))
    have = 0 if sketch is None else sketch.shape[1]
    more = matrix @ _random_columns(matrix, max(columns - have, 0), seed=1)
    image = more if sketch is None else torch.cat([sketch[:, :columns], more], dim=1)
    before = None
    for done in range(rounds + 1):
        basis = torch.linalg.qr(image).Q
        image = matrix @ basis
        if done == 0:
            continue  # never settled so soon, and the small eigenproblem is a fifth of a round
        inner = basis.T @ image
        values = torch.linalg.eigvalsh(inner).flip(0)[:k]
        if before is not None:
            real = values > RELATIVE_CUTOFF * values[0]
            if ((values - before).abs()[real] / values[real]).mean() < tolerance:
                values, rotation = torch.linalg.eigh(inner)
                return values.flip(0)[:k], basis @ rotation.flip(1)[:, :k]
        before = values
    return None


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
