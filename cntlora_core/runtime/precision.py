"""Which number format a device computes in, and where a wider one stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import autocast

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


def best_precision(device: torch.device) -> Literal["float32", "bfloat16", "float16"]:
    """The format for frozen weights: on CUDA bfloat16 where the card has it, else float16.

    Other devices get float32: bfloat16 is slower than that on most CPUs.
    """
    if device.type != "cuda":
        return "float32"
    # Cards that only emulate bfloat16 are many times slower in it.
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Within the block, float32 products on CUDA may be computed in TF32; elsewhere nothing is.

    TF32 has float32's range and 10 bits of mantissa: enough for a training step, too little for
    second moments and decompositions.
    """
    if device.type != "cuda":
        yield
        return
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = True
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def multiply_in(dtype: torch.dtype, linears: Iterable[nn.Module]) -> None:
    """Let modules with float32 weights compute in another format, through autocast.

    Args:
        dtype: The format of their products.
        linears: The modules, whose ``forward`` is replaced; the weights stay as they are.
    """
    for linear in linears:
        device = next(linear.parameters()).device.type
        linear.forward = autocast(device, dtype)(linear.forward)
