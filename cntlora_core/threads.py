"""How many threads a model's operations are divided among, by their size.

Two threads that share an operation wait for each other at its end. Where the operation is short,
and anything else runs on the machine, the waiting takes longer than the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORTH_DIVIDING = 20_000_000
"""Multiplications of a linear layer on one picture from which several threads are used. The small
model's first level has 1 million (64 px), Stable Diffusion 1.5's 419 million (512 px)."""


def threads_for(unet: Any) -> int:
    """The number of threads for work with this denoiser: 1, or all that torch has.

    It depends on the model's configuration alone, so that all stages and a resumed run agree.

    Args:
        unet: A UNet2DConditionModel; its first level's pixels and width are what counts.
    """
    config = unet.config
    pixels, width = config["sample_size"] ** 2, config["block_out_channels"][0]
    return torch.get_num_threads() if pixels * width**2 >= WORTH_DIVIDING else 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses this many threads; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
