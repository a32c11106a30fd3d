"""Convolutions as linear maps: the rows that a kernel, written as a matrix, multiplies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d

Convolution = nn.Conv1d | nn.Conv2d

CHUNK_ELEMENTS = 2**24
"""How many numbers of an unfolded input are held at once (64 MB in float32)."""


def unfolded_width(conv: nn.Conv2d) -> int:
    """Features of the unfolded input: input channels times kernel height times kernel width."""
    return conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]


def unfolded_rows(
    conv: nn.Conv2d, x: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[Tensor]:
    """The unfolded input of an ungrouped convolution, a chunk of output positions at a time.

    A convolution gives, at each output position, ``row @ kernel.flatten(1).T``, the row being the
    (c_in, kh, kw) patch beneath it, with the convolution's own stride, padding and dilation.

    Args:
        conv: The convolution.
        x: (n, c_in, h, w) or (c_in, h, w).
        chunk_elements: Upper bound of a chunk's numbers, but for the least chunk: one row of
            output positions.

    Yields:
        (positions, c_in * kh * kw), in x's dtype.
    """
    x = padded(conv, x if x.ndim == 4 else x[None])
    (kernel_h, kernel_w), (stride_h, stride_w) = conv.kernel_size, conv.stride
    (dilation_h, dilation_w) = conv.dilation
    count, channels, height, width = x.shape
    out_h = (height - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    out_w = (width - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    if count == 0 or out_h < 1 or out_w < 1:
        return
    step_n, step_c, step_h, step_w = x.stride()
    patches = x.as_strided(
        (count, out_h, out_w, channels, kernel_h, kernel_w),
        (
            step_n,
            step_h * stride_h,
            step_w * stride_w,
            step_c,
            step_h * dilation_h,
            step_w * dilation_w,
        ),
        x.storage_offset(),
    )
    features = unfolded_width(conv)
    per_line = out_w * features
    images = max(1, chunk_elements // (out_h * per_line))
    lines = out_h if images > 1 else max(1, chunk_elements // per_line)
    for first in range(0, count, images):
        for top in range(0, out_h, lines):
            yield patches[first : first + images, top : top + lines].reshape(-1, features)


def padded(conv: Convolution, x: Tensor) -> Tensor:
    """An input with the margins that a convolution gives it, in its padding mode."""
    margins: list[int] = []  # F.pad begins with the last dimension
    for i in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[i] * (conv.kernel_size[i] - 1)
            margins += [total // 2, total - total // 2]
        elif conv.padding == "valid":
            margins += [0, 0]
        else:
            margins += [int(conv.padding[i])] * 2
    if not any(margins):
        return x
    return F.pad(x, margins, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def same_geometry(first: nn.Conv2d, second: nn.Conv2d) -> bool:
    """Whether two convolutions look at their inputs alike."""
    return all(
        getattr(first, name) == getattr(second, name)
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    )


@torch.no_grad()
def with_geometry_of(conv: nn.Conv2d, other: nn.Conv2d) -> nn.Conv2d:
    """The same kernel in a convolution that looks at its input as ``other`` does."""
    weight = conv.weight
    made = Conv2d(
        conv.in_channels,
        conv.out_channels,
        other.kernel_size,  # pyright: ignore[reportArgumentType]
        other.stride,  # pyright: ignore[reportArgumentType]
        other.padding,  # pyright: ignore[reportArgumentType]
        other.dilation,  # pyright: ignore[reportArgumentType]
        bias=False,
        padding_mode=other.padding_mode,  # pyright: ignore[reportArgumentType]
        device="meta",
    )
    made.weight = weight
    return made.train(conv.training)
