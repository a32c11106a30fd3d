"""The change of weight that LAVA learns, as pure functions of its factor matrices.

One factor matrix per dimension of the weight, rank R (the LAVA paper, equation 3):

    dW[o, i, y, x] = sum_r U[o, r] V[i, r] Y[y, r] X[x, r]

A matrix has two dimensions, ``dW = U @ V.T``, which is LoRA; the kernel of a one-dimensional
convolution has three. Convolving with that sum is convolving with three small kernels in a row: 1x1
by V, one small kernel for each of the R channels by Y and X, 1x1 by U.

In groups of no more than R input channels each (depthwise convolutions), that would make R channels
of so few at every position; the summed kernel is then the smaller by far, and is convolved with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from cntlora_core.layers.unfolding import Convolution, padded

_CONVOLVE = {1: F.conv1d, 2: F.conv2d}


def delta(u: Tensor, v: Tensor, spatial: Sequence[Tensor] = ()) -> Tensor:
    """The whole change of weight, which a forward pass builds for narrow groups only.

    Args:
        u: (c_out, R).
        v: (c_in, R); of a grouped convolution, (c_in / groups, R).
        spatial: (kh, R) and (kw, R); (k, R) for one dimension; nothing for a matrix.

    Returns:
        (c_out, c_in, kh, kw), the shape of the weight.
    """
    right = v
    for factor in spatial:
        right = right[..., None, :] * factor
    return (u @ right.flatten(0, -2).T).unflatten(1, right.shape[:-1])


def small_kernel(spatial: Sequence[Tensor]) -> Tensor:
    """What is between the two 1x1 kernels: (R, 1, kh, kw), ``Y[y, r] X[x, r]`` for each channel."""
    kernel = spatial[0]
    for factor in spatial[1:]:
        kernel = kernel[..., None, :] * factor
    return kernel.movedim(-1, 0)[:, None]


def linear(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``x @ dW.T``, (..., d_in) -> (..., d_out), for ``dW = U @ V.T``."""
    return F.linear(F.linear(x, v.T), u)


def convolve(
    x: Tensor, u: Tensor, v: Tensor, spatial: Sequence[Tensor], conv: Convolution
) -> Tensor:
    """What a convolution would give with the kernel ``delta(u, v, spatial)`` and no bias.

    A convolution in groups has a kernel of (c_out, c_in / groups, kh, kw): all groups share V, Y
    and X, and each has its own rows of U.

    Args:
        x: (n, c_in, h, w) or (c_in, h, w); (n, c_in, l) or (c_in, l) for one dimension.
        u: (c_out, R).
        v: (c_in / groups, R).
        spatial: As in :func:`delta`.
        conv: How the input is looked at: stride, padding and its mode, dilation, groups.
    """
    if x.ndim == len(spatial) + 1:
        return convolve(x[None], u, v, spatial, conv)[0]
    apply, groups, rank = _CONVOLVE[len(spatial)], conv.groups, u.shape[1]
    zeros = conv.padding_mode == "zeros"
    padding = conv.padding if zeros else 0
    if groups > 1 and v.shape[0] <= rank:
        x = x if zeros else padded(conv, x)
        kernel = delta(u, v, spatial)
        return apply(x, kernel, None, conv.stride, padding, conv.dilation, groups)
    ones = (1,) * len(spatial)
    count = x.shape[0]
    if groups > 1:
        x = x.unflatten(1, (groups, -1)).flatten(0, 1)
    kernel = small_kernel(spatial)
    pointwise = kernel.shape[2:].numel() == 1
    down = v * kernel.flatten() if pointwise else v  # one channel each: a factor of V
    down = down.T.reshape(rank, -1, *ones)
    if pointwise:
        h = apply(x if zeros else padded(conv, x), down, stride=conv.stride, padding=padding)
    else:
        h = apply(x, down)  # with no bias, so that margins may as well be added afterwards
        h = apply(
            h if zeros else padded(conv, h), kernel, None, conv.stride, padding, conv.dilation, rank
        )
    if groups > 1:
        h = h.unflatten(0, (count, groups)).flatten(1, 2)
    return apply(h, u.reshape(-1, rank, *ones), groups=groups)


def factor_names(weight_dimensions: int) -> tuple[str, ...]:
    """The names of the factors of a weight: of a matrix U, V; of a kernel also Y and X."""
    return {2: ("U", "V"), 3: ("U", "V", "X"), 4: ("U", "V", "Y", "X")}[weight_dimensions]
