"""Backgrounds that captions can name: plain colours, patterns, simple scenes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["COLOURS", "PATTERNS", "SCENES", "draw_pattern", "draw_plain", "draw_scene"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (250, 214, 40),
    "green": (60, 165, 70),
    "blue": (45, 100, 210),
    "purple": (130, 60, 175),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
    "gray": (135, 135, 135),
    "black": (22, 22, 24),
    "white": (246, 246, 246),
}

Grid = tuple[np.ndarray, np.ndarray]


def _grid(size: int) -> Grid:
    """Coordinates y, x (size, size) in [0, 1)."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def _shade(colour: str | tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A named colour with a little jitter, float32 (3,) in 0..255."""
    base = np.asarray(COLOURS[colour] if isinstance(colour, str) else colour, dtype=np.float32)
    shade = base * rng.uniform(0.93, 1.05) + rng.uniform(-6, 6, 3)
    return np.clip(shade, 0, 255).astype(np.float32)


def _mix(mask: np.ndarray, on: np.ndarray, off: np.ndarray) -> np.ndarray:
    """mask (h, w) in [0, 1]; colours (3,) -> (h, w, 3)."""
    return mask[..., None] * on + (1 - mask[..., None]) * off


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise (size, size) in [0, 1]: bilinear interpolation of a coarse random grid."""
    coarse = rng.random((cells + 1, cells + 1), dtype=np.float32)
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * cells
    low = np.minimum(at.astype(np.int64), cells - 1)
    part = at - low
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _soft(wave: np.ndarray, sharpness: float) -> np.ndarray:
    return np.clip(wave * sharpness + 0.5, 0, 1)


def draw_plain(colour: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """One colour with a slight fall of light, float32 (size, size, 3) in 0..255."""
    y, _ = _grid(size)
    light = 1 + rng.uniform(-0.05, 0.05) * (y - 0.5)
    return light[..., None] * _shade(colour, rng)


def _second(colour: str) -> str:
    return "gray" if colour == "white" else "white"


def _stripes(colour: str, rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    angle = rng.choice([0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]) + rng.uniform(-0.1, 0.1)
    count = rng.uniform(3.5, 6)
    wave = np.sin(2 * np.pi * (count * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
    return _mix(_soft(wave, size / 32), _shade(colour, rng), _shade(_second(colour), rng))


def _dots(colour: str, rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    count = rng.uniform(4, 6)
    v = (y + rng.random()) * count
    u = (x + rng.random()) * count + 0.5 * (np.floor(v) % 2)
    distance = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
    mask = _soft(rng.uniform(0.28, 0.36) - distance, size / count)
    return _mix(mask, _shade(colour, rng), _shade(_second(colour), rng))


def _checks(colour: str, rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    count = rng.uniform(1.8, 3.2)
    wave = np.sin(2 * np.pi * (count * x + rng.random())) * np.sin(
        2 * np.pi * (count * y + rng.random())
    )
    return _mix(_soft(wave, size / 12), _shade(colour, rng), _shade(_second(colour), rng))


def _gradient(colour: str, rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.72 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    return _mix(np.clip(ramp, 0, 1), _shade(colour, rng), _shade(_second(colour), rng))


PATTERNS: dict[str, Callable[[str, np.random.Generator, int], np.ndarray]] = {
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "gradient": _gradient,
}


def draw_pattern(pattern: str, colour: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A pattern of one named colour with white (gray with white), float32 (size, size, 3)."""
    return PATTERNS[pattern](colour, rng, size)


def _two_tone(
    rng: np.random.Generator,
    size: int,
    cells: int,
    dark: tuple[int, int, int],
    bright: tuple[int, int, int],
) -> np.ndarray:
    return _mix(_noise(rng, size, cells), _shade(bright, rng), _shade(dark, rng))


def _horizon(
    rng: np.random.Generator, size: int, low: float = 0.3, high: float = 0.5
) -> np.ndarray:
    """Mask (size, size), 1 below a horizon at a random height."""
    y, _ = _grid(size)
    return _soft(y - rng.uniform(low, high), size)


def _blend(below: np.ndarray, above: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return mask[..., None] * below + (1 - mask[..., None]) * above


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    y, _ = _grid(size)
    sky = _mix(y, _shade((185, 222, 250), rng), _shade((95, 170, 240), rng))
    clouds = _soft(0.5 * (_noise(rng, size, 4) + _noise(rng, size, 8)) - 0.62, 7)
    return _mix_image(clouds, _shade((252, 252, 255), rng), sky)


def _mix_image(mask: np.ndarray, on: np.ndarray, image: np.ndarray) -> np.ndarray:
    return mask[..., None] * on + (1 - mask[..., None]) * image


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    _, x = _grid(size)
    blades = 0.5 + 0.5 * np.sin(
        2 * np.pi * (14 * x + 1.6 * _noise(rng, size, 8) + 1.2 * _noise(rng, size, 16))
    )
    field = _mix(blades * 0.75, _shade((120, 200, 70), rng), _shade((45, 125, 40), rng))
    return _blend(field, _sky(rng, size), _horizon(rng, size, 0.18, 0.36))


def _snow(rng: np.random.Generator, size: int) -> np.ndarray:
    ground = _two_tone(rng, size, 5, (205, 220, 240), (250, 252, 255))
    air = _two_tone(rng, size, 3, (130, 150, 185), (165, 185, 215))
    image = _blend(ground, air, _horizon(rng, size))
    y, x = _grid(size)
    for cy, cx in rng.random((26, 2)):
        flake = _soft(rng.uniform(0.010, 0.020) - np.hypot(y - cy, x - cx), size)
        image = _mix_image(flake, np.array([255, 255, 255], np.float32), image)
    return image


def _beach(rng: np.random.Generator, size: int) -> np.ndarray:
    y, _ = _grid(size)
    sand = _two_tone(rng, size, 16, (222, 188, 120), (246, 222, 165))
    sea = _two_tone(rng, size, 6, (30, 130, 190), (60, 170, 215))
    image = _blend(sea, _sky(rng, size), _horizon(rng, size, 0.16, 0.28))
    shore = rng.uniform(0.42, 0.55) + 0.05 * (_noise(rng, size, 4) - 0.5)
    image = _mix_image(
        _soft(0.025 - np.abs(y - shore), size), np.array([245, 250, 250], np.float32), image
    )
    return _blend(sand, image, _soft(y - shore, size))


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    wave = np.sin(
        2 * np.pi * (rng.uniform(5, 7) * y + 0.12 * np.sin(2 * np.pi * (3 * x + rng.random())))
        + 2.5 * _noise(rng, size, 5)
    )
    return _mix(_soft(wave, 1.2), _shade((60, 170, 225), rng), _shade((20, 100, 180), rng))


def _forest(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    image = _two_tone(rng, size, 8, (25, 85, 45), (85, 155, 70))
    for cx in np.arange(6) / 6 + rng.uniform(0, 0.16, 6):
        trunk = _soft(rng.uniform(0.018, 0.04) - np.abs(x - cx + 0.04 * (y - 0.5)), size)
        image = _mix_image(trunk, _shade((85, 58, 36), rng), image)
    floor = _two_tone(rng, size, 12, (60, 75, 30), (105, 100, 50))
    return _blend(floor, image, _horizon(rng, size, 0.72, 0.85))


def _desert(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    sky = _mix(y, _shade((255, 225, 170), rng), _shade((250, 170, 95), rng))
    crest = np.sin(2 * np.pi * (rng.uniform(0.8, 1.6) * x + rng.random()))
    dune = rng.uniform(0.35, 0.5) + 0.07 * crest
    ripple = 0.5 + 0.5 * np.sin(2 * np.pi * (9 * y + 0.8 * _noise(rng, size, 4)))
    sand = _mix(ripple * 0.6, _shade((235, 180, 100), rng), _shade((205, 140, 70), rng))
    return _blend(sand, sky, _soft(y - dune, size))


def _space(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    image = _two_tone(rng, size, 3, (10, 10, 30), (40, 25, 75))
    for cy, cx in rng.random((30, 2)):
        star = _soft(rng.uniform(0.004, 0.014) - np.hypot(y - cy, x - cx), size)
        image = _mix_image(star, np.array([255, 250, 220], np.float32), image)
    return image


def _brick(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    rows = rng.uniform(6, 8)
    v = (y + rng.random()) * rows
    u = (x + rng.random()) * rows / 2 + 0.5 * (np.floor(v) % 2)
    gap = np.minimum(np.minimum(v % 1, 1 - v % 1), 2 * np.minimum(u % 1, 1 - u % 1))
    face = _two_tone(rng, size, 10, (160, 70, 50), (190, 95, 70))
    mortar = np.broadcast_to(_shade((215, 205, 195), rng), face.shape)
    return _blend(face, mortar, _soft(gap - 0.1, 6))


def _wood(rng: np.random.Generator, size: int) -> np.ndarray:
    y, _ = _grid(size)
    grain = 0.5 + 0.5 * np.sin(2 * np.pi * (12 * y + 1.5 * _noise(rng, size, 3)))
    image = _mix(grain * 0.6, _shade((200, 145, 90), rng), _shade((160, 105, 60), rng))
    planks = rng.uniform(4, 5)
    v = (y + rng.random()) * planks
    gap = _soft(0.06 - np.minimum(v % 1, 1 - v % 1), size / planks)
    return _mix_image(gap, _shade((85, 52, 30), rng), image)


def _mountains(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    image = _sky(rng, size)
    for centre in (rng.uniform(0.05, 0.35), rng.uniform(0.6, 0.95)):
        top = rng.uniform(0.12, 0.28) + rng.uniform(0.9, 1.2) * np.abs(x - centre)
        image = _mix_image(_soft(y - top, size), _shade((105, 110, 130), rng), image)
        cap = _soft(np.minimum(y - top, rng.uniform(0.34, 0.42) - y), size)
        image = _mix_image(cap, _shade((245, 247, 252), rng), image)
    return _mix_image(_horizon(rng, size, 0.66, 0.76), _shade((100, 160, 85), rng), image)


def _city(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    image = _mix(y, _shade((250, 215, 175), rng), _shade((150, 190, 230), rng))
    for index in range(6):
        left, top = index / 6 + rng.uniform(-0.02, 0.02), rng.uniform(0.1, 0.5)
        body = _soft(np.minimum(y - top, np.minimum(x - left, left + 0.155 - x)), size)
        grey = rng.uniform(70, 120)
        image = _mix_image(body, np.array([grey, grey, grey + 18], np.float32), image)
        lights = body * ((x - left) * 26 % 2 > 1) * ((y - top) * 20 % 2 > 1)
        image = _mix_image(lights * 0.9, np.array([250, 225, 130], np.float32), image)
    return _mix_image(_horizon(rng, size, 0.82, 0.88), _shade((80, 80, 84), rng), image)


# Phrase in the caption -> drawing.
SCENES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "on the grass": _grass,
    "in the snow": _snow,
    "on the beach": _beach,
    "in the water": _water,
    "in the sky": _sky,
    "in the forest": _forest,
    "in the desert": _desert,
    "in space": _space,
    "in front of a brick wall": _brick,
    "on a wooden floor": _wood,
    "in the mountains": _mountains,
    "in the city": _city,
}


def draw_scene(phrase: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A scene named by its phrase, float32 (size, size, 3) in 0..255."""
    return SCENES[phrase](rng, size)
