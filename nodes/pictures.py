"""Pillow pictures to ComfyUI's IMAGE and back, and pictures shown on a node."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .host import folder_paths


def read_picture(path: Path) -> Image.Image:
    """A picture file, in memory."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def image_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as an IMAGE: (n, height, width, 3), float32 in [0, 1]."""
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0 for picture in pictures]
    return torch.from_numpy(np.stack(arrays))


def image_arrays(images: Sequence[Tensor]) -> list[np.ndarray]:
    """Each picture of some IMAGEs, (height, width, channels), of whatever sizes."""
    return [picture.detach().float().cpu().numpy() for batch in images for picture in batch]


def shown(pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What makes ComfyUI show pictures on the node: files in its temporary folder."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"cntlora_{secrets.token_hex(6)}.png" for _ in pictures]
    for name, picture in zip(names, pictures):
        picture.save(folder / name, compress_level=1)
    return {"images": [{"filename": n, "subfolder": "", "type": "temp"} for n in names]}
