"""Composing a captioned picture: objects, placed at random, on a background that has a name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from cntlora_core.mini.making.backgrounds import (
    COLOURS,
    PATTERNS,
    SCENES,
    draw_pattern,
    draw_plain,
    draw_scene,
)
from cntlora_core.mini.making.object_classes import MODEL_CLASSES, ObjectClass, with_article
from cntlora_core.mini.making.sprites import STYLES, SpriteSource, premultiplied_array

__all__ = [
    "Background",
    "ComposeConfig",
    "Composer",
    "Placement",
    "any_background",
    "paste",
    "render_background",
]


@dataclass(frozen=True)
class ComposeConfig:
    """How pictures are composed.

    Attributes:
        size: side of the picture in pixels.
        smallest: least side of a lone object, as a part of the frame.
        largest: greatest side of a lone object, as a part of the frame.
        rotation: greatest rotation in degrees, either way.
        pair_share: part of the samples with two objects.
        recolour_share: part of the samples with one object dyed in a named colour.
        hat_share: part of the samples of live objects with a hat or crown on.
        mirror_share: part of the objects that are mirrored left to right.
        nonsense_share: part of the captions with a meaningless word before the noun.
        bare_share: part of the samples whose caption names no background. They have a plain one,
            half of them white, so that a prompt without a background does not bring a scene along.
    """

    size: int = 64
    smallest: float = 0.6
    largest: float = 0.92
    rotation: float = 15.0
    pair_share: float = 0.12
    recolour_share: float = 0.1
    hat_share: float = 0.1
    mirror_share: float = 0.0
    nonsense_share: float = 0.04
    bare_share: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest <= 1:
            raise ValueError(
                f"0 < smallest <= largest <= 1 must hold; smallest={self.smallest}, "
                f"largest={self.largest}"
            )


@dataclass(frozen=True)
class Background:
    """What is behind the objects.

    Attributes:
        kind: ``"plain"``, a key of ``PATTERNS``, or ``"scene"``.
        value: a colour name, or for a scene its phrase.
    """

    kind: str
    value: str

    @property
    def phrase(self) -> str:
        """``"on a red background"``, ``"on blue stripes"``, ``"in the snow"``, ..."""
        if self.kind == "scene":
            return self.value
        if self.kind == "plain":
            return f"on {with_article(self.value)} background"
        if self.kind == "gradient":
            return f"on {with_article(self.value)} gradient"
        return f"on {self.value} {self.kind}"


@dataclass(frozen=True)
class Placement:
    """Where an object goes.

    Attributes:
        extent: longer side as a part of the frame.
        centre: y, x in 0..1.
        angle: rotation in degrees.
        flip: mirrored left to right.
    """

    extent: float
    centre: tuple[float, float]
    angle: float
    flip: bool


def render_background(background: Background, rng: np.random.Generator, size: int) -> np.ndarray:
    """float32 (size, size, 3) in 0..255."""
    if background.kind == "plain":
        return draw_plain(background.value, rng, size)
    if background.kind == "scene":
        return draw_scene(background.value, rng, size)
    return draw_pattern(background.kind, background.value, rng, size)


def any_background(rng: np.random.Generator) -> Background:
    """40 % plain, 25 % patterned, 35 % scenes; within each, all alike often."""
    chance = rng.random()
    if chance < 0.4:
        return Background("plain", str(rng.choice(list(COLOURS))))
    if chance < 0.65:
        return Background(str(rng.choice(list(PATTERNS))), str(rng.choice(list(COLOURS))))
    return Background("scene", str(rng.choice(list(SCENES))))


def paste(image: np.ndarray, sprite: Image.Image, placement: Placement) -> tuple[int, int]:
    """Lay a premultiplied sprite over ``image`` (h, w, 3), in place; returns its topmost (y, x)."""
    size = image.shape[0]
    if placement.flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = placement.extent * size / max(sprite.size)
    if scale < 1:
        side = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
        turned = sprite.resize(side, Image.Resampling.BICUBIC)
        turned = turned.rotate(placement.angle, Image.Resampling.BICUBIC, expand=True)
    else:
        turned = sprite.rotate(placement.angle, Image.Resampling.BICUBIC, expand=True)
        side = (round(turned.width * scale), round(turned.height * scale))
        turned = turned.resize(side, Image.Resampling.BICUBIC)
    top = round(placement.centre[0] * size - turned.height / 2)
    left = round(placement.centre[1] * size - turned.width / 2)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + turned.height, size), min(left + turned.width, size)
    layer = premultiplied_array(turned)[y0 - top : y1 - top, x0 - left : x1 - left]
    image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - layer[..., 3:]) + layer[..., :3]
    solid = np.argwhere(layer[..., 3] > 0.6)
    if len(solid) == 0:
        return y0, (x0 + x1) // 2
    row = solid[0, 0]
    return y0 + int(row), x0 + int(np.median(solid[solid[:, 0] <= row + 1, 1]))


def dye(sprite: Image.Image, colour: str) -> Image.Image:
    """Paint a premultiplied sprite in a named colour, keeping light and shade."""
    array = premultiplied_array(sprite)
    alpha = np.maximum(array[..., 3:], 1e-3)
    light = (array[..., :3] / alpha) @ np.array([0.3, 0.59, 0.11], np.float32) / 255
    target = np.array(COLOURS[colour], np.float32)
    light = np.clip(light, 0, 1)[..., None]
    shade, shine = target * light / 0.55, target + (255 - target) * (light - 0.55) * 1.4
    tinted = np.where(light < 0.55, shade, shine)
    array[..., :3] = np.clip(0.12 * array[..., :3] + 0.88 * tinted * array[..., 3:], 0, 255)
    array[..., 3] *= 255
    return Image.frombytes("RGBa", sprite.size, array.round().astype(np.uint8).tobytes())


class Composer:
    """Draws sample number ``i`` of a seeded, endless set of captioned pictures.

    Args:
        source: where the emoji are.
        config: sizes and shares.
        classes: what may be shown.
        styles: in which drawing styles.
        seed: with the index it fixes a sample wholly.
    """

    def __init__(
        self,
        source: SpriteSource,
        config: ComposeConfig,
        seed: int,
        classes: tuple[ObjectClass, ...] = MODEL_CLASSES,
        styles: tuple[str, ...] = STYLES,
    ) -> None:
        self.config, self.seed, self.classes = config, seed, classes
        self._sprites = {
            object_class.name: {
                style: source.sprite(style, object_class.emoji[0])
                for style in styles
                if source.is_shown(style, object_class.emoji[0])
            }
            for object_class in classes
        }
        self._hats = {
            (style, word): source.sprite(style, emoji)
            for style in styles
            for word, emoji in (("hat", "tophat"), ("crown", "crown"))
        }

    def sample(self, index: int) -> tuple[np.ndarray, str]:
        """Sample ``index``: uint8 (size, size, 3) and its caption."""
        image, caption, _ = self.sample_with_cover(index)
        return image, caption

    def sample_with_cover(self, index: int) -> tuple[np.ndarray, str, np.ndarray]:
        """Sample ``index``, and where its objects are: bool (size, size)."""
        rng = np.random.default_rng((self.seed, index))
        cfg = self.config
        named = bool(rng.random() >= cfg.bare_share)
        background = any_background(rng) if named else _default_background(rng)
        image = render_background(background, rng, cfg.size)
        before = image.copy()
        if rng.random() < cfg.pair_share:
            subject = self._draw_pair(image, rng)
        else:
            subject = self._draw_one(image, rng)
        cover = np.abs(image - before).max(axis=2) > 4
        image = np.clip(image.round(), 0, 255).astype(np.uint8)
        return image, _caption(subject, background if named else None, rng), cover

    def _pick(self, rng: np.random.Generator) -> ObjectClass:
        return self.classes[rng.integers(len(self.classes))]

    def _choose(
        self, object_class: ObjectClass, rng: np.random.Generator
    ) -> tuple[str, Image.Image]:
        """A style that the object is drawn in, and the drawing."""
        drawings = list(self._sprites[object_class.name].items())
        return drawings[rng.integers(len(drawings))]

    def _placement(
        self, rng: np.random.Generator, small: float, large: float, left: float, right: float
    ) -> Placement:
        extent = rng.uniform(small, large)
        slack = (1 - extent) / 2
        y = 0.5 + rng.uniform(-slack, slack)
        x = rng.uniform(left, right) if right > left else 0.5 + rng.uniform(-slack, slack)
        turn = self.config.rotation * float(np.clip(rng.normal(0, 0.45), -1, 1))
        return Placement(extent, (y, x), turn, bool(rng.random() < self.config.mirror_share))

    def _draw_one(self, image: np.ndarray, rng: np.random.Generator) -> str:
        cfg = self.config
        object_class = self._pick(rng)
        style, sprite = self._choose(object_class, rng)
        words = object_class.name
        if rng.random() < cfg.nonsense_share:
            words = f"{_nonsense(rng)} {words}"
        extra = ""
        hat = object_class.kind == "live" and rng.random() < cfg.hat_share
        if rng.random() < cfg.recolour_share:
            colour = str(rng.choice([c for c in COLOURS if c not in ("black", "white", "gray")]))
            sprite, words = dye(sprite, colour), f"{colour} {words}"
        if not hat:
            paste(image, sprite, self._placement(rng, cfg.smallest, cfg.largest, 0, 0))
            return with_article(words)
        place = self._placement(rng, cfg.smallest, 0.68, 0, 0)
        low = (0.94 - place.extent / 2, place.centre[1])
        place = Placement(place.extent, low, place.angle / 2, place.flip)
        y, x = paste(image, sprite, place)
        word = "hat" if rng.random() < 0.5 else "crown"
        extent = 0.45 * place.extent
        top = ((y + 1.5) / cfg.size - 0.38 * extent, x / cfg.size)
        paste(image, self._hats[style, word], Placement(extent, top, place.angle / 2, False))
        extra = f" wearing {with_article(word)}"
        return with_article(words) + extra

    def _draw_pair(self, image: np.ndarray, rng: np.random.Generator) -> str:
        pair = (self._pick(rng), self._pick(rng))
        while pair[0] is pair[1]:
            pair = (pair[0], self._pick(rng))
        centres = ((0.23, 0.30), (0.70, 0.77))
        for object_class, (left, right) in zip(pair, centres, strict=True):
            place = self._placement(rng, 0.42, 0.54, left, right)
            paste(image, self._choose(object_class, rng)[1], place)
        if rng.random() < 0.5:
            pair = pair[::-1]
        joint = " and " if rng.random() < 0.7 else " with "
        return with_article(pair[0].name) + joint + with_article(pair[1].name)


_RARE_WORDS = ("sks", "zwx", "ohwx")


def _nonsense(rng: np.random.Generator) -> str:
    """A word without meaning, now and then one of those that stand for subjects."""
    if rng.random() < 0.3:
        return str(rng.choice(_RARE_WORDS))
    letters = rng.choice(list("abcdefghijklmnoprstuvwxz"), rng.integers(2, 5))
    return "".join(letters)


_OPENINGS = ("a photo of ", "a photo of ", "a picture of ", "an image of ", "", "")


def _default_background(rng: np.random.Generator) -> Background:
    """What is behind an object when the caption does not say."""
    return Background("plain", "white" if rng.random() < 0.5 else str(rng.choice(list(COLOURS))))


def _caption(subject: str, background: Background | None, rng: np.random.Generator) -> str:
    phrase = "" if background is None else background.phrase
    if background is not None and background.kind != "scene" and rng.random() < 0.2:
        phrase = "with " + phrase.removeprefix("on ")
        if not phrase.endswith(("background", "gradient")):
            phrase += " in the background"
    opening = _OPENINGS[rng.integers(len(_OPENINGS))]
    return f"{opening}{subject} {phrase}".strip()
