"""Configurations that are not a family's own are tried on the smallest input."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch

from cntlora_core.diffusion.checkpoint import read_json

_LARGEST_SAMPLE = 4096
_NO_SHAPE = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""Fields of a configuration that change nothing of what is built."""


def is_stock(config: Path, stock_config: Path) -> bool:
    """Whether a configuration describes the family's own part, which needs no trial."""
    stock, given = read_json(stock_config), read_json(config)
    return all(
        stock.get(key) == value
        for key, value in given.items()
        if not key.startswith("_") and key not in _NO_SHAPE
    )


def require_working(part: str, model: Any) -> None:
    """Runs a part on the smallest input that it takes: do its layers fit together?

    Raises:
        Exception: what the layers raise; and a ValueError for settings that are read later.
    """
    weight = next(model.parameters())
    new = functools.partial(torch.zeros, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        if part.startswith("text_encoder"):
            length = model.config.max_position_embeddings
            model(torch.zeros(1, length, dtype=torch.long, device=weight.device))
            return
        side = model.config["sample_size"]
        if part == "vae":
            scale = model.config["scaling_factor"]
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"scaling_factor must be a positive number, got {scale!r}")
            for name in ("latents_mean", "latents_std"):
                if model.config.get(name) is not None:
                    raise ValueError(
                        f"{name} is set: latents that are normalised by channel, as EDM models "
                        "have them, are not supported"
                    )
            side = 2 ** len(model.config["block_out_channels"])
            model(new(1, 3, side, side))
            return
        if type(side) is not int or not 1 <= side <= _LARGEST_SAMPLE:
            raise ValueError(f"sample_size must be a whole number of latent pixels, got {side!r}")
        width, channels = model.config["cross_attention_dim"], model.config["in_channels"]
        side = 2 ** len(model.config["block_out_channels"])
        added = None
        if model.config["addition_embed_type"] == "text_time":
            added = {"text_embeds": new(1, pooled_width(model)), "time_ids": new(1, 6)}
        model(new(1, channels, side, side), new(1), new(1, 1, width), added_cond_kwargs=added)


def pooled_width(unet: Any) -> int:
    """Width of the pooled text embedding that a UNet of SDXL's make reads beside six sizes."""
    config = unet.config
    return config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
