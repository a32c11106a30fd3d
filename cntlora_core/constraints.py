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
from cntlora_core.linalg import PrincipalSubspace, Spectrum, thin_spectrum


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


def delta_spectrum(
    weight: Tensor,
    subspace: PrincipalSubspace,
    config: CNTLoRAConfig,
) -> Spectrum:
    """The spectrum of the delta of one attachment point.

    Args:
        weight: W, (d_out, d_in), the frozen weight.
        subspace: Eigenpairs of the normalised second moment of the weight's inputs; the delta acts
            within their span.
        config: Constraint, damping and shift.

    Returns:
        ``dW = M @ V.T`` with ``M = W @ V * g(lam)``, of rank ``subspace.rank`` at most.

    Raises:
        ValueError: if the shift is a matrix of another width than the weight's inputs.
    """
    vectors = subspace.vectors.to(weight.dtype)
    gain = GAINS[config.constraint](subspace.values, config.damping).to(weight.dtype)
    seen = weight @ vectors
    if config.constraint == "shift":
        seen = _shifted(seen, subspace, vectors, config)
    return thin_spectrum(seen * gain, vectors)


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


def _shifted(
    seen: Tensor, subspace: PrincipalSubspace, vectors: Tensor, config: CNTLoRAConfig
) -> Tensor:
    """``W V (V.T K V)`` from ``W V``."""
    check_shift_width("the weight", vectors.shape[0], config)
    if config.shift_matrix is not None:
        matrix = torch.as_tensor(config.shift_matrix).detach().to(vectors)
        return seen @ (vectors.T @ matrix @ vectors)
    if isinstance(config.shift, str):
        return seen @ _normal_shift(subspace.rank, config.seed).to(vectors)
    return seen * float(config.shift)


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
