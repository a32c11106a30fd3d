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
    shift_matrix: Tensor | None = None,
) -> Spectrum:
    """The spectrum of the delta of one attachment point.

    Args:
        weight: W, (d_out, d_in), the frozen weight.
        subspace: Eigenpairs of the normalised second moment of the weight's inputs; the delta acts
            within their span.
        config: Constraint, damping and shift.
        shift_matrix: K of the ``shift`` constraint, (d_in, d_in), in place of ``config.shift``.

    Returns:
        ``dW = M @ V.T`` with ``M = W @ V * g(lam)``, of rank ``subspace.rank`` at most.
    """
    vectors = subspace.vectors.to(weight.dtype)
    gain = GAINS[config.constraint](subspace.values, config.damping).to(weight.dtype)
    if config.constraint == "shift":
        if shift_matrix is not None:
            vectors_shifted = vectors @ (vectors.T @ shift_matrix.to(weight.dtype) @ vectors)
        elif isinstance(config.shift, str):
            vectors_shifted = vectors @ _normal_shift(subspace.rank, weight, config.seed)
        else:
            vectors_shifted = vectors * config.shift
    else:
        vectors_shifted = vectors
    return thin_spectrum(weight @ vectors_shifted * gain, vectors)


def _normal_shift(rank: int, like: Tensor, seed: int) -> Tensor:
    """``V.T @ K @ V`` for a K of independent standard normal entries.

    An orthonormal V leaves such a matrix's distribution unchanged, so the (rank, rank) block is
    drawn directly; it is scaled by ``rank ** -0.5``, which keeps the length of what it multiplies.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    return (block / max(rank, 1) ** 0.5).to(like)
