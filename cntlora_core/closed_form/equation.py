"""The method as one equation; the fast code computes the same, and is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from cntlora_core.activations.moments import Moment
from cntlora_core.closed_form.constraints import least_squares_scale, normal_shift
from cntlora_core.config import CNTLoRAConfig


def delta(weight: Tensor, moment: Moment, config: CNTLoRAConfig, rank: int | None = None) -> Tensor:
    """``dW = T (c h(lam) - 1) V.T``, without the 1 for ``shift``; derived in docs/method.md.

    lam and V are the leading eigenpairs of C, in units of its mean eigenvalue, and ``T = W V``, for
    ``shift`` ``W V (V.T K V)``. All of it is computed in float64, with no regard to time.

    Args:
        weight: W, (d_out, d_in).
        moment: C, the second moment of the weight's inputs, of at least one row that is not zero.
        config: Constraint, unit, damping and shift.
        rank: How many eigenpairs; None for all that the data supports.

    Returns:
        (d_out, d_in) float64.
    """
    c = moment.matrix.double()
    lam, v = torch.linalg.eigh(c / c.diagonal().mean())
    lam, v = lam.flip(0)[:rank], v.flip(1)[:, :rank]
    supported = lam > torch.finfo(moment.matrix.dtype).eps * len(c) * lam[0]
    lam, v = lam[supported], v[:, supported]
    shift, least_change = config.constraint == "shift", config.unit == "least-change"
    t = weight.double() @ v @ _shift(v, config) if shift else weight.double() @ v
    lam = lam if least_change else lam + config.damping
    h = lam**-0.5 if config.constraint == "self" else 1 / lam
    unit = least_squares_scale(h, t.square().sum(0)) if least_change else 1.0
    return t * (unit * h - (0.0 if shift else 1.0)) @ v.T


def _shift(v: Tensor, config: CNTLoRAConfig) -> Tensor:
    """``V.T K V``."""
    if config.shift == "normal":
        return normal_shift(v.shape[1], config.seed)
    matrix = config.shift_matrix
    return config.shift * v.T @ v if matrix is None else v.T @ matrix.double() @ v
