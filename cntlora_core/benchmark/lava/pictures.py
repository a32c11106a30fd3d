"""Pictures to pre-train and to fine-tune on: shapes that are drawn here, emoji, photographs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cntlora_core.benchmark.lava.settings import LavaBenchmark

Sampler = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""``sample(count, generator)``: pictures (count, 3, size, size) in -1..1, labels (count,)."""

SHAPES = (
    *("disc", "triangle", "square", "pentagon", "star of 5", "star of 4"),
    *("flower of 3", "flower of 5", "ellipse", "bar", "cross", "half disc"),
)


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a model is fine-tuned on, validated and tested with; each (n, 3, s, s) and (n,)."""

    classes: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def source_pictures(settings: LavaBenchmark) -> tuple[int, Sampler]:
    """The number of classes, and fresh pictures of the style that is pre-trained on."""
    if settings.source == "emoji":
        assert settings.sprites is not None
        return _emoji(settings.sprites, ("google", "twitter"), settings.size)
    return len(SHAPES), _shapes(settings.size, "flat")


def _shapes(size: int, style: str) -> Sampler:
    return lambda count, generator: draw_shapes(count, size, style, generator)


def target_pictures(settings: LavaBenchmark, seed: int) -> Pictures:
    """What is fine-tuned on, the same for a seed; tested on pictures that were not seen."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    count, tested = settings.pictures, max(64, min(1000, 2 * settings.pictures))
    if settings.target == "photos":
        assert settings.photos is not None
        return _photographs(settings.photos, settings.size, count, tested, generator)
    if settings.target == "emoji":
        assert settings.sprites is not None
        classes, sample = _emoji(settings.sprites, ("3d",), settings.size)
    else:
        classes, sample = len(SHAPES), _shapes(settings.size, "sketch")
    return Pictures(
        classes, sample(count, generator), sample(tested // 2, generator), sample(tested, generator)
    )


def radius_table(angles: int = 360) -> Tensor:
    """(shapes, angles): how far each shape reaches from its middle, 1 at the most."""
    theta = torch.arange(angles) * (2 * math.pi / angles)
    cosine, sine = theta.cos().abs().clamp_min(1e-6), theta.sin().abs().clamp_min(1e-6)

    def polygon(sides: int) -> Tensor:
        part = 2 * math.pi / sides
        return math.cos(part / 2) / (theta % part - part / 2).cos()

    def star(points: int) -> Tensor:
        part = 2 * math.pi / points
        return 1 / (1 + 1.6 * (1 - (theta % part / part - 0.5).abs() * 2))

    def box(wide: float, high: float) -> Tensor:
        return torch.minimum(wide / cosine, high / sine)

    rows = [
        torch.ones(angles),
        *(polygon(n) for n in (3, 4, 5)),
        *(star(n) for n in (5, 4)),
        *((0.7 + 0.3 * (n * theta).cos()) for n in (3, 5)),
        1 / ((cosine**2) + (sine / 0.5) ** 2).sqrt(),
        box(1.0, 0.25),
        torch.maximum(box(1.0, 0.3), box(0.3, 1.0)),
        torch.where(theta.sin() > 0, torch.ones(angles), (0.1 / sine).clamp(max=1.0)),
    ]
    table = torch.stack(rows)
    return table / table.amax(1, keepdim=True)


def draw_shapes(
    count: int, size: int, style: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Shapes at random places, sizes and turns.

    Args:
        count: How many pictures.
        size: Their side.
        style: ``flat``: one colour on another. ``sketch``: a thin, uneven outline on rough paper,
            with stray strokes.
        generator: Of everything random.

    Returns:
        Pictures (count, 3, size, size) in -1..1, and labels, indices into ``SHAPES``.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    reach = uniform(0.4, 0.85, count)
    middle = (1 - reach)[:, None] * uniform(-1, 1, count, 2)
    y, x = y - middle[:, 0, None, None], x - middle[:, 1, None, None]
    table = radius_table()
    angle = torch.atan2(y, x) + uniform(0, 2 * math.pi, count, 1, 1)
    index = (angle / (2 * math.pi) * table.shape[1]).long() % table.shape[1]
    edge = table[labels][torch.arange(count)[:, None, None], index] * reach[:, None, None]
    distance = (x**2 + y**2).sqrt() - edge
    soft = 2 / size
    if style == "flat":
        inside = torch.sigmoid(-distance / (soft / 2))[:, None]
        on, off = uniform(-1, 1, count, 3, 1, 1), uniform(-1, 1, count, 3, 1, 1)
        # Never a shape of its background's colour.
        near = ((on - off).abs().amax(1, keepdim=True) < 0.6).float()
        on = on * (1 - near) - torch.sign(off) * near
        return (inside * on + (1 - inside) * off).clamp(-1, 1), labels
    width = uniform(0.6, 1.6, count, 1, 1) * soft
    wobble = _rough(count, size, 8, generator) * soft
    ink = torch.exp(-(((distance + wobble) / width) ** 2))
    for _ in range(2):  # strokes that belong to no shape
        turn, shift = uniform(0, math.pi, count, 1, 1), uniform(-0.9, 0.9, count, 1, 1)
        across = x * turn.cos() + y * turn.sin() - shift
        ink = torch.maximum(ink, 0.7 * torch.exp(-((across / soft) ** 2)))
    paper = 0.55 + 0.3 * _rough(count, size, 6, generator) + 0.1 * uniform(-1, 1, count, size, size)
    tint = uniform(0.6, 1.0, count, 3, 1, 1)
    picture = paper[:, None] * tint - 1.3 * ink[:, None]
    return picture.clamp(-1, 1), labels


def _rough(count: int, size: int, cells: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(count, 1, cells, cells, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[:, 0]


def _emoji(node_modules: Path, styles: tuple[str, ...], size: int) -> tuple[int, Sampler]:
    from cntlora_core.mini.making.collage import Collage, CollageConfig, every_background
    from cntlora_core.mini.making.object_classes import CORE_NAMES, OBJECT_CLASSES
    from cntlora_core.mini.making.sprites import SpriteSource

    source, named = (
        SpriteSource(node_modules),
        {object_class.name: object_class for object_class in OBJECT_CLASSES},
    )
    sprites, names = [], []
    for style in styles:
        for number, name in enumerate(CORE_NAMES):
            for emoji in named[name].emoji:
                if source.path(style, emoji).is_file():
                    sprites.append(source.sprite(style, emoji))
                    names.append(number)
    name_of = torch.tensor(names)
    backgrounds = every_background()
    collage = Collage(sprites, backgrounds, 11, CollageConfig(size=size, per_background=4))

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            chosen = torch.randint(len(sprites), (count,))
            return collage.compose(chosen, torch.randint(len(backgrounds), (count,))), name_of[
                chosen
            ]

    return len(CORE_NAMES), sample


def _photographs(
    folder: Path, size: int, count: int, tested: int, generator: torch.Generator
) -> Pictures:
    """Random crops; for validation and test, those of photographs that training never shows.

    Which photographs these are is sampled too: one of each class for either.
    """
    from cntlora_core.data.photos import load_photos

    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    classes = [load_photos(path).photos for path in inner]
    if len(classes) < 2 or min(map(len, classes)) < 3:
        raise ValueError(
            f"{folder} must hold at least 2 folders of at least 3 photographs each, to train on "
            f"some and test on others; it has {[len(photos) for photos in classes]}"
        )

    classes = [
        [photos[i] for i in torch.randperm(len(photos), generator=generator)] for photos in classes
    ]

    def crops(kind: int, wanted: int) -> tuple[Tensor, Tensor]:
        pictures, labels = [], []
        for _ in range(wanted):
            label = int(torch.randint(len(classes), (), generator=generator))
            photos = classes[label]
            third = photos[:-2] if kind == 0 else photos[-2:-1] if kind == 1 else photos[-1:]
            image = third[int(torch.randint(len(third), (), generator=generator))].image
            pictures.append(_crop(image.convert("RGB"), size, generator))
            labels.append(label)
        return torch.stack(pictures), torch.tensor(labels)

    return Pictures(len(classes), crops(0, count), crops(1, tested // 2), crops(2, tested))


def _crop(image, size: int, generator: torch.Generator) -> Tensor:
    import numpy as np
    from PIL import Image

    part, at_x, at_y, mirror = torch.rand(4, generator=generator).tolist()
    side = (0.6 + 0.4 * part) * min(image.size)
    left, top = at_x * (image.width - side), at_y * (image.height - side)
    box = (left, top, left + side, top + side)
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if mirror < 0.5:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    array = np.asarray(resized, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
