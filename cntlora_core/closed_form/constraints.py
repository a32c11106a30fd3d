"""From a weight and the second moment of its inputs to a delta: the closed forms.

All three start from one demand: on target data the adapted layer gives what the pre-trained layer
gave on source data, ``X_tar @ W_tar.T = X_src @ W.T``. They differ in what they assume of the
source activations, which nobody has seen; docs/method.md derives each. The closed forms are a
reconstruction from the published constraints of ConsNoTrainLoRA (arXiv 2507.08044) and its
supplement: they are not quoted from the paper's main text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cntlora_core.closed_form.factorization import seeded_generator
from cntlora_core.closed_form.spectra import (
    RELATIVE_CUTOFF,
    PrincipalSubspace,
    Spectrum,
    gram_matrix,
    singular_values,
    thin_spectrum,
)
from cntlora_core.config import CNTLoRAConfig


def gains(eigenvalues: Tensor, squared_norms: Tensor, config: CNTLoRAConfig) -> Tensor:
    """g(lam): what the delta does along each kept direction of the inputs.

    ``g = c h(lam) - 1`` for ``cross`` (``h = 1 / lam``) and ``self`` (``h = lam^-1/2``), and
    ``g = c h(lam)`` for ``shift`` (``h = 1 / lam``), derived in docs/method.md.

    With ``unit="least-change"`` c is the least-squares scale of ``T h(C)`` towards ``T``, so that
    ``sum(squared_norms * g^2) <= sum(squared_norms)`` whatever the eigenvalues; with ``"mean"`` c
    is 1 and lam is damped.

    Args:
        eigenvalues: lam, (k,) float64, positive; of the second moment in units of its mean
            eigenvalue.
        squared_norms: ``|T v_j|^2``, (k,) float64, of the directions v_j; T is the weight, for
            ``shift`` the weight times K.
        config: Constraint, unit and damping.

    Returns:
        (k,) float64.
    """
    least_change = config.unit == "least-change"
    lam = eigenvalues if least_change else eigenvalues + config.damping
    h = lam.rsqrt() if config.constraint == "self" else 1.0 / lam
    if least_change:
        h = least_squares_scale(h, squared_norms) * h
    return h if config.constraint == "shift" else h - 1.0


def least_squares_scale(h: Tensor, squared_norms: Tensor) -> Tensor:
    """The c that brings ``c h_j t_j`` nearest to ``t_j``, ``squared_norms`` being ``|t_j|^2``."""
    size = (squared_norms * h.square()).sum()
    return (squared_norms * h).sum() / size if size > 0 else torch.ones_like(size)


class PointDelta:
    """The delta of one attachment point, in as many leading directions of its inputs as are asked.

    ``dW = M @ V.T`` with ``M = W @ V * g(lam)``. ``W @ V`` and its Gram matrix are computed once:
    those of fewer directions are their leading parts.

    Args:
        weight: W, (d_out, d_in), the frozen weight.
        subspace: Eigenpairs of the normalised second moment of the weight's inputs; the delta acts
            within their span.
        config: Constraint, unit, damping and shift.

    Raises:
        ValueError: if the shift is a matrix of another width than the weight's inputs.
    """

    def __init__(self, weight: Tensor, subspace: PrincipalSubspace, config: CNTLoRAConfig) -> None:
        if config.constraint == "shift":
            check_shift_width("the weight", weight.shape[1], config)
        self._subspace, self._config = subspace, config
        self._vectors = subspace.vectors.to(weight.dtype)
        self._seen = weight @ self._vectors
        self._gram = gram_matrix(self._seen)

    def singular_values(self) -> Tensor:
        """Of the delta in all directions, descending, without those that are rounding."""
        _, gram, floor = self._within(self._subspace)
        return singular_values(gram, floor)

    def spectrum(self, directions: int | None = None) -> Spectrum:
        """Of the delta in the leading ``directions``; None for all."""
        count = self._subspace.rank if directions is None else directions
        right, gram, floor = self._within(self._subspace.leading(count))
        right = right.to(self._seen.dtype)
        seen, vectors = self._seen[:, :count], self._vectors[:, :count]
        matrix = seen @ right if right.ndim == 2 else seen * right
        return thin_spectrum(matrix, vectors, gram, floor)

    def _within(self, subspace: PrincipalSubspace) -> tuple[Tensor, Tensor, float]:
        """The delta M in leading directions, by what it makes of ``W @ V``.

        Returns:
            What turns ``W @ V`` into M, float64, (k,) for each column or (k, k); ``M.T @ M``,
            (k, k) float64; and the size below which a singular value of M is rounding: M is a
            difference of two matrices that may be nearly equal.
        """
        config, seen = self._config, self._gram[: subspace.rank, : subspace.rank]
        mixing = (
            _shift_within(subspace, config)
            if config.constraint == "shift"
            else torch.ones_like(subspace.values)
        )
        squared_norms = _seen_through(mixing, seen).diagonal()
        right = mixing * gains(subspace.values, squared_norms, config)
        floor = RELATIVE_CUTOFF * float(squared_norms.sum().sqrt())
        return right, _seen_through(right, seen), floor


def _seen_through(right: Tensor, gram: Tensor) -> Tensor:
    """The Gram matrix of ``W @ V @ right``, from that of ``W @ V``; a (k,) right is a diagonal."""
    return right.T @ gram @ right if right.ndim == 2 else right[:, None] * gram * right


def check_shift_width(name: str, width: int, config: CNTLoRAConfig) -> None:
    """Refuse a shift that is a matrix of another width than an attachment point's inputs.

    Raises:
        ValueError: naming the point and both widths.
    """
    matrix = config.shift_matrix
    if matrix is not None and matrix.shape[0] != width:
        raise ValueError(
            f"shift is a matrix of {matrix.shape[0]} x {matrix.shape[1]}, but {name} reads "
            f"{width} features: a matrix fits attachment points of its own width only; narrow "
            "target_modules to those, or give shift as a number or 'normal'"
        )


def _shift_within(subspace: PrincipalSubspace, config: CNTLoRAConfig) -> Tensor:
    """``V.T @ K @ V``, (k, k) float64, or (k,) for a K that is a number times the identity."""
    if config.shift_matrix is not None:
        vectors = subspace.vectors.double()
        matrix = torch.as_tensor(config.shift_matrix).detach().to(vectors)
        return vectors.T @ matrix @ vectors
    if isinstance(config.shift, str):
        return normal_shift(subspace.rank, config.seed)
    return torch.full_like(subspace.values, float(config.shift))


def normal_shift(rank: int, seed: int) -> Tensor:
    """``V.T @ K @ V`` for a K of independent standard normal entries.

    An orthonormal V leaves such a matrix's distribution unchanged, so the (rank, rank) block is
    drawn directly, row and column of an index at a time, so that a smaller rank gets
    the leading block of a larger one's, as it does with a K that is given. The block is scaled by
    ``rank ** -0.5``, which keeps the length of what it multiplies.
    """
    generator = seeded_generator(seed)
    block = torch.empty(rank, rank, dtype=torch.float64)
    for i in range(rank):
        drawn = torch.randn(2 * i + 1, generator=generator, dtype=torch.float64)
        block[i, : i + 1], block[:i, i] = drawn[: i + 1], drawn[i + 1 :]
    return block / max(rank, 1) ** 0.5
