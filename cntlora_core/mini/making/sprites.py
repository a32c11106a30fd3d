"""Reading emoji pictures from the npm packages, by style and short name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from cntlora_core.mini.making.object_classes import HELD_OUT_NAMES, KEPT_OUT_3D, OBJECT_CLASSES

__all__ = ["STYLES", "TRAINED_STYLES", "SpriteSource"]

STYLES = ("google", "twitter", "3d")
TRAINED_STYLES = ("google", "twitter")
"""The styles that the self-supervised encoder was trained on."""


_SKIN_TONE = re.compile("1f3f[b-f]")


class SpriteSource:
    """The emoji packages below one ``node_modules`` folder.

    Args:
        node_modules: folder that ``python -m cntlora_core.mini.making.fetch`` filled.
    """

    def __init__(self, node_modules: Path) -> None:
        self.root = Path(node_modules)
        table = self.root / "emoji-datasource-google" / "emoji.json"
        if not table.is_file():
            raise FileNotFoundError(
                f"No {table}; run `python -m cntlora_core.mini.making.fetch --cache FOLDER` first."
            )
        rows = json.loads(table.read_text(encoding="utf-8"))
        self.codepoints = {row["short_name"]: row["unified"].lower() for row in rows}

    def path(self, style: str, emoji: str) -> Path:
        """File of one emoji in ``"google"``, ``"twitter"`` or ``"3d"``."""
        code = self.codepoints[emoji]
        if style == "3d":
            return self.root / "@lobehub" / "fluent-emoji-3d" / "assets" / f"{code}.webp"
        return self.root / f"emoji-datasource-{style}" / "img" / style / "64" / f"{code}.png"

    def is_shown(self, style: str, emoji: str) -> bool:
        """Whether training may show this drawing: it is there, and not in ``KEPT_OUT_3D``."""
        kept_out = style == "3d" and emoji in KEPT_OUT_3D
        return not kept_out and self.path(style, emoji).is_file()

    def sprite(self, style: str, emoji: str) -> Image.Image:
        """The picture, RGBA with premultiplied alpha, cut to what is not transparent."""
        with Image.open(self.path(style, emoji)) as file:
            image = file.convert("RGBA")
        return crop_premultiplied(image)

    def everything(self) -> list[Image.Image]:
        """All emoji but those of the held-out names and, in the 3D style, ``KEPT_OUT_3D``."""
        hidden = {
            self.codepoints[emoji]
            for object_class in OBJECT_CLASSES
            if object_class.name in HELD_OUT_NAMES
            for emoji in object_class.emoji
        }
        doubles = {self.codepoints[emoji] for emoji in KEPT_OUT_3D}
        return [
            _at_most(sprite, 96)
            for style in STYLES
            for code, sprite in self.all_of(style, skin_tones=style != "3d").items()
            if code not in (hidden | doubles if style == "3d" else hidden)
        ]

    def all_of(self, style: str, skin_tones: bool = True) -> dict[str, Image.Image]:
        """Every emoji of a style by its code points, in their order.

        Args:
            style: ``"google"``, ``"twitter"`` or ``"3d"``.
            skin_tones: with those that differ from another in the colour of the skin only.
        """
        sprites = {}
        sample = self.path(style, "dog")
        for path in sorted(sample.parent.glob(f"*{sample.suffix}")):
            if not skin_tones and _SKIN_TONE.search(path.stem):
                continue
            with Image.open(path) as file:
                image = file.convert("RGBA")
            if image.getchannel("A").getbbox() is not None:
                sprites[path.stem] = crop_premultiplied(image)
        return sprites


def crop_premultiplied(image: Image.Image) -> Image.Image:
    """RGBA -> its visible box as ``RGBa`` (resampling it leaves no dark or coloured fringe)."""
    visible = image.getchannel("A").point([255 * (alpha > 12) for alpha in range(256)])
    return image.crop(visible.getbbox()).convert("RGBa")


def _at_most(sprite: Image.Image, side: int) -> Image.Image:
    scale = side / max(sprite.size)
    if scale >= 1:
        return sprite
    size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    return sprite.resize(size, Image.Resampling.LANCZOS)


def premultiplied_array(image: Image.Image) -> np.ndarray:
    """``RGBa`` image -> float32 (h, w, 4), colour in 0..255 already times alpha, alpha in 0..1."""
    array = np.asarray(image, dtype=np.float32).copy()
    array[..., 3] /= 255
    return array
