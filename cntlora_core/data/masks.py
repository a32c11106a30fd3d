"""Masks of photos: which part of a picture is learnt, and the weights of the loss that follow.

A mask is a grey picture: white is learnt, black is not, greys count in between. It is the photo's
own transparency, or a picture beside it, by the names that trainers know:

- ``dog1.mask.png``
- ``dog1-masklabel.png``, as OneTrainer has it
- ``masks/dog1.png``, a folder like sd-scripts' ``conditioning_data_dir``
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from cntlora_core.data.framing import Frame
from cntlora_core.data.pictures import UprightPicture

FOLDER_NAME = "masks"
_ENDINGS = (".mask", "-masklabel")


def masked_stem(path: Path) -> str | None:
    """Of a mask beside a photo: the photo's name without its ending; None for other files."""
    for ending in _ENDINGS:
        if path.stem.lower().endswith(ending) and len(path.stem) > len(ending):
            return path.stem[: -len(ending)]
    return None


def mask_files(files: Iterable[Path], folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """The mask of each photo by the photo's name without its ending.

    Args:
        files: of the photos' folder.
        folder: that folder.
        suffixes: of pictures.
    """
    inner, known = folder / FOLDER_NAME, set(suffixes)
    named = [(path.stem, path) for path in sorted(inner.iterdir())] if inner.is_dir() else []
    named += [(stem, path) for path in files if (stem := masked_stem(path)) is not None]
    return {stem: path for stem, path in named if path.suffix.lower() in known}


def mask_picture(picture: UprightPicture) -> Image.Image:
    """A mask file's picture as a mask, mode L: what is transparent counts as black."""
    grey = picture.rgb.convert("L")
    return grey if picture.mask is None else ImageChops.multiply(grey, picture.mask)


def fitted_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """A mask in its photo's size; None for one of a single grey, which tells no part from another.

    Args:
        mask: mode L.
        size: width and height of the photo.

    Raises:
        ValueError: black throughout, or of another shape than the photo.
    """
    low, high = mask.getextrema()
    if high == 0:
        raise ValueError("is black throughout")
    if low == high:
        return None
    width, height = size
    wanted = mask.width * height / width
    if abs(mask.height - wanted) > max(1.0, 0.01 * wanted):
        raise ValueError(
            f"is of another shape than its photo, {mask.width} x {mask.height} to {width} x "
            f"{height} pixels"
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def loss_weights(
    mask: Image.Image, part: Frame, size: tuple[int, int], unmasked_weight: float, flip: bool
) -> Tensor | None:
    """The loss weight of each latent, (height, width), float32, of mean 1.

    Each latent counts as much as its pixels are white on average, and at least
    ``unmasked_weight``. Divided by their mean, the weights leave the scale of the loss and of its
    gradient as it is, however small the subject is in the photo.

    Args:
        mask: of the whole photo, mode L.
        part: what is kept of the photo.
        size: width and height in latents.
        unmasked_weight: from 0 to 1.
        flip: for the mirrored photo.

    Returns:
        None if all latents count alike.
    """
    averaged = mask.convert("F").resize(size, Image.Resampling.BOX, box=part.box)
    weights = torch.from_numpy(np.array(averaged, dtype=np.float32)) / 255.0
    weights = weights.clamp(unmasked_weight, 1.0)
    if float(weights.max() - weights.min()) < 1e-6:
        return None
    return ((weights.flip(-1) if flip else weights) / weights.mean()).contiguous()
