"""Batches of objects on backgrounds, made with tensors: faster than :mod:`.compose`, no pairs.

The encoders that measure images are trained on these. A sprite is turned, scaled and moved by one
bilinear resampling; backgrounds are drawn beforehand, several of each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cntlora_core.mini.making.backgrounds import COLOURS, PATTERNS, SCENES
from cntlora_core.mini.making.compose import Background, render_background

__all__ = ["Collage", "CollageConfig", "every_background", "hue_rotation", "square_sprite"]


@dataclass(frozen=True)
class CollageConfig:
    """How a sprite is laid on a background.

    Attributes:
        size: side of the picture in pixels.
        smallest: least side of an object, as a part of the frame.
        largest: greatest side of an object, as a part of the frame.
        rotation: greatest rotation in degrees, either way.
        mirror_share: part of the sprites mirrored left to right.
        blur_share: part of the pictures that are blurred.
        light: greatest change of brightness, as a factor up or down.
        dye_share: part of the sprites whose hues are turned, each by an angle of its own, so that
            an encoder knows things by their shape too.
        per_background: how many pictures of each background are drawn.
    """

    size: int = 64
    smallest: float = 0.5
    largest: float = 0.95
    rotation: float = 25.0
    mirror_share: float = 0.5
    blur_share: float = 0.5
    light: float = 0.15
    dye_share: float = 0.0
    per_background: int = 16


def every_background() -> list[Background]:
    """All that have a name: plain, patterned, scenes."""
    plain = [Background("plain", colour) for colour in COLOURS]
    patterned = [Background(kind, colour) for kind in PATTERNS for colour in COLOURS]
    return plain + patterned + [Background("scene", phrase) for phrase in SCENES]


class Collage:
    """Lays sprites on backgrounds.

    Args:
        sprites: premultiplied (``RGBa``) pictures of any size.
        backgrounds: what they may lie on.
        seed: of the drawn backgrounds.
        config: placement and disturbances.
    """

    def __init__(
        self,
        sprites: Sequence[Image.Image],
        backgrounds: Sequence[Background],
        seed: int,
        config: CollageConfig | None = None,
    ) -> None:
        self.config = config or CollageConfig()
        size = self.config.size
        self.sprites = torch.stack([square_sprite(sprite, size) for sprite in sprites])
        self.backgrounds = list(backgrounds)
        drawn = [
            render_background(background, np.random.default_rng((seed, index, copy)), size)
            for index, background in enumerate(backgrounds)
            for copy in range(self.config.per_background)
        ]
        pictures = np.clip(np.stack(drawn).round(), 0, 255).astype(np.uint8)
        self._drawn = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def compose(self, sprites: Tensor, backgrounds: Tensor) -> Tensor:
        """Pictures with random placement, by torch's global generator.

        Args:
            sprites: (n,) indices.
            backgrounds: (n,) indices into the list of backgrounds.

        Returns:
            (n, 3, size, size) float32 in -1..1.
        """
        cfg, count = self.config, len(sprites)
        copies = torch.randint(cfg.per_background, (count,))
        under = self._drawn[backgrounds * cfg.per_background + copies].float() / 255
        layer = functional.grid_sample(
            self.sprites[sprites].float() / 255,
            functional.affine_grid(self._placements(count), [count, 4, cfg.size, cfg.size], False),
            align_corners=False,
        )
        pictures = under * (1 - layer[:, 3:]) + self._dyed(layer)
        light = 1 + cfg.light * (2 * torch.rand(count, 1, 1, 1) - 1)
        pictures = (pictures * light).clamp(0, 1) * 2 - 1
        soft = torch.rand(count) < cfg.blur_share
        if soft.any():
            pictures[soft] = _blurred(pictures[soft])
        return pictures

    def _dyed(self, layer: Tensor) -> Tensor:
        """(n, 3, h, w) colours of a premultiplied (n, 4, h, w) layer, hues turned in a share."""
        if not self.config.dye_share:
            return layer[:, :3]
        angle = 2 * torch.pi * torch.rand(len(layer))
        angle[torch.rand(len(layer)) >= self.config.dye_share] = 0
        turned = torch.einsum("nij,njhw->nihw", hue_rotation(angle), layer[:, :3])
        return turned.clamp(min=0).minimum(layer[:, 3:])

    def _placements(self, count: int) -> Tensor:
        """(n, 2, 3) affine maps from the picture's coordinates to the sprite's."""
        cfg = self.config
        extent = cfg.smallest + (cfg.largest - cfg.smallest) * torch.rand(count)
        angle = torch.deg2rad(cfg.rotation * (2 * torch.rand(count) - 1))
        centre = (1 - extent)[:, None] * (2 * torch.rand(count, 2) - 1)
        mirror = torch.where(torch.rand(count) < cfg.mirror_share, -1.0, 1.0)
        cosine, sine = angle.cos() / extent, angle.sin() / extent
        turn = torch.stack(
            [
                torch.stack([mirror * cosine, -mirror * sine], 1),
                torch.stack([sine, cosine], 1),
            ],
            1,
        )
        return torch.cat([turn, -turn @ centre[..., None]], 2)


def hue_rotation(angle: Tensor) -> Tensor:
    """(n, 3, 3) rotations of RGB about the grey axis by (n,) angles in radians."""
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    return cosine * torch.eye(3) + (1 - cosine) / 3 + sine * across


def square_sprite(sprite: Image.Image, size: int) -> Tensor:
    """Premultiplied RGBA uint8 (4, size, size), the sprite's longer side filling it."""
    scale = size / max(sprite.size)
    side = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    resized = np.asarray(sprite.resize(side, Image.Resampling.BICUBIC))
    square = np.zeros((size, size, 4), np.uint8)
    top, left = (size - side[1]) // 2, (size - side[0]) // 2
    square[top : top + side[1], left : left + side[0]] = resized
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def _blurred(pictures: Tensor) -> Tensor:
    """A 3 x 3 or 5 x 5 binomial blur, the same for the whole batch."""
    row = torch.tensor([1.0, 2, 1] if torch.rand(()) < 0.5 else [1.0, 4, 6, 4, 1])
    kernel = (row[:, None] * row / row.sum() ** 2).expand(3, 1, -1, -1)
    reach = len(row) // 2
    padded = functional.pad(pictures, (reach,) * 4, mode="replicate")
    return functional.conv2d(padded, kernel, groups=3)
