"""Momentum with orthogonalised updates for matrices and kernels (Muon).

After Keller Jordan's Muon (2024, kellerjordan.github.io/posts/muon) with the step length of
arXiv 2502.16982, which makes AdamW's learning rates fit. Beside it AdamW takes what is no matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalised"]

# Coefficients of the quintic iteration, from Jordan's post: singular values end in 0.7 to 1.2.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About ``U V^T`` of the singular value decomposition ``U S V^T``.

    A Newton-Schulz iteration that multiplies small Gram matrices only: every iterate is a
    polynomial in ``matrix @ matrix.T`` times ``matrix``.

    Args:
        matrix: (rows, columns) float32.
        iterations: of the quintic polynomial.

    Returns:
        (rows, columns); singular values above a thousandth of the Frobenius norm become about 1.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T, iterations).T
    matrix = matrix / (matrix.norm() + 1e-12)
    gram = matrix @ matrix.T
    product = torch.eye(len(matrix), dtype=matrix.dtype)
    for step in range(iterations):
        factor = torch.addmm(_CUBIC * gram, gram, gram, alpha=_QUINTIC)
        factor.diagonal().add_(_LINEAR)
        product = factor @ product
        if step < iterations - 1:
            gram = factor @ gram @ factor
    return product @ matrix


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum, each as long as AdamW's would about be.

    Args:
        parameters: of at least two dimensions; kernels count as (out, all the rest).
        lr: learning rate.
        momentum: decay of the averaged gradient, Nesterov's.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step from the parameters' gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                mean = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(mean, group["momentum"]).flatten(1)
                update = orthogonalised(ahead).view(parameter.shape)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * max(ahead.shape) ** 0.5 * group["lr"])
