"""Pictures of samples, to tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cntlora_core.runtime.reading import reading

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, by channel; what DINOv2, SAM and Depth-Anything were trained with."""


def open_picture(source: Any, mode: str = "RGB") -> Image.Image:
    """A picture from a path, a Pillow image, or what a data set holds of one.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it cannot be read as a picture.
    """
    if isinstance(source, Mapping):  # undecoded, as parquet files hold it
        source = io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"]
    if isinstance(source, Image.Image):
        return source if source.mode == mode else source.convert(mode)
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise FileNotFoundError(f"the image {source} is not there")
        with reading(Path(source), "a picture"), Image.open(source) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    return Image.open(source).convert(mode)


def pixels(
    picture: Image.Image,
    size: tuple[int, int],
    filter: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """A picture of that (height, width), normalised as ImageNet's are: float32 (3, h, w)."""
    resized = picture.resize((size[1], size[0]), filter)
    values = torch.from_numpy(np.asarray(resized, dtype=np.float32).copy()) / 255
    return ((values - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()
