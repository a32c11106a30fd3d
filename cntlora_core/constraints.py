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

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.factorization import seeded_generator
from cntlora_core.linalg import (
    PrincipalSubspace,
    Spectrum,
    gram_matrix,
    singular_values,
    thin_spectrum,
)


def cross_gain(eigenvalues: Tensor, damping: float) -> Tensor:
    """``1/(lam + eps) - 1``: with ``X_src.T @ X_tar / N = I``, ``dW = W (C^-1 - I)``."""
    return 1.0 / (eigenvalues + damping) - 1.0


def self_gain(eigenvalues: Tensor, damping: float) -> Tensor:
    """``(lam + eps)^-1/2 - 1``: with ``X_src.T @ X_src / N = I``, ``dW = W (C^-1/2 - I)``."""
    return (eigenvalues + damping).rsqrt() - 1.0


def shift_gain(eigenvalues: Tensor, damping: float) -> Tensor:
    """``1/(lam + eps)``: with ``(X_src - X_tar).T @ X_tar / N = K``, ``dW = W K C^-1``."""
    return 1.0 / (eigenvalues + damping)


GAINS = {"cross": cross_gain, "self": self_gain, "shift": shift_gain}


class PointDelta:
    """The delta of one attachment point, in as many leading directions of its inputs as are asked.

    ``dW = M @ V.T`` with ``M = W @ V * g(lam)``. ``W @ V`` and its Gram matrix are computed once:
    those of fewer directions are their leading parts.

    Args:
        weight: W, (d_out, d_in), the frozen weight.
        subspace: Eigenpairs of the normalised second moment of the weight's inputs; the delta acts
            within their span.
        config: Constraint, damping and shift.

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
        return singular_values(self._gram_of(self._subspace))

    def spectrum(self, directions: int | None = None) -> Spectrum:
        """Of the delta in the leading ``directions``; None for all."""
        count = self._subspace.rank if directions is None else directions
        subspace = self._subspace.leading(count)
        right = self._right(subspace).to(self._seen.dtype)
        seen, vectors = self._seen[:, :count], self._vectors[:, :count]
        matrix = seen @ right if right.ndim == 2 else seen * right
        return thin_spectrum(matrix, vectors, self._gram_of(subspace))

    def _gram_of(self, subspace: PrincipalSubspace) -> Tensor:
        right, gram = self._right(subspace), self._gram[: subspace.rank, : subspace.rank]
        return right.T @ gram @ right if right.ndim == 2 else right[:, None] * gram * right

    def _right(self, subspace: PrincipalSubspace) -> Tensor:
        """What turns ``W @ V`` into M, float64: (k,) for each column, or (k, k)."""
        config = self._config
        gain = GAINS[config.constraint](subspace.values, config.damping)
        if config.constraint != "shift":
            return gain
        mixing = _shift_within(subspace, config)
        return mixing * gain


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
        return _normal_shift(subspace.rank, config.seed)
    return torch.full_like(subspace.values, float(config.shift))


def _normal_shift(rank: int, seed: int) -> Tensor:
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
