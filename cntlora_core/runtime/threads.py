"""How many threads a model's operations are divided among, by their size.

Two threads that share an operation wait for each other at its end. Where the operation is short,
and anything else runs on the machine, the waiting takes longer than the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORTH_DIVIDING = 16_000_000
"""Multiplications of a linear layer from which several threads are used. For one picture the small
model's first level has 1 million (64 px), Stable Diffusion 1.5's 419 million (512 px); the small
encoders have 2 million, DINO's ViT-S/16 has 29 million."""


def threads_for(unet: Any, pictures: int = 1) -> int:
    """The number of threads for work with this denoiser: 1, or all that torch has.

    In training it depends on the model's configuration alone, so that all stages and a resumed run
    agree.

    Args:
        unet: A UNet2DConditionModel; its first level's pixels and width are what counts.
        pictures: How many it reads at once, where images are generated.
    """
    config = unet.config
    return _threads_for(pictures * config["sample_size"] ** 2, config["block_out_channels"][0])


def threads_for_encoder(config: Any) -> int:
    """As :func:`threads_for`, for a vision transformer.

    Args:
        config: Of transformers; its patches and width are what counts.
    """
    side, patch = (_side(getattr(config, name, 1)) for name in ("image_size", "patch_size"))
    return _threads_for((side // patch) ** 2, getattr(config, "hidden_size", 1))


def _threads_for(positions: int, width: int) -> int:
    return torch.get_num_threads() if positions * width**2 >= WORTH_DIVIDING else 1


def _side(size: Any) -> int:
    """Configurations hold one side, or height and width."""
    return size if isinstance(size, int) else size[0]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses this many threads; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
