"""Which part of a picture is kept, and at which size: a square, or the aspect-ratio bucket that
fits the picture best.

A bucket is a size of about the area of the training square, with sides that suit the model. A photo
takes the bucket that loses least of it, and only what still sticks out is cropped, on both sides
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

LARGEST_ASPECT = 2
"""Of the longer to the shorter side of a bucket; a panorama is cropped to it."""
AREAS = (Fraction(7, 8), Fraction(9, 8))
"""Least and largest area of a bucket, of the square's. At 512 pixels in steps of 64 that leaves
8 shapes; photos of 3:4, 2:3 and 9:16 lose 3 to 5 %."""
WORTH_SAYING = 0.005
"""Of a side: less is cropped without a word."""


@dataclass(frozen=True)
class Frame:
    """The part of a picture that is kept, and the size to which it is resized.

    Attributes:
        picture: width and height of the whole picture.
        size: width and height that the part is resized to.
        box: left, top, right and bottom of the part, in the picture's pixels.
    """

    picture: tuple[int, int]
    size: tuple[int, int]
    box: tuple[float, float, float, float]

    @property
    def cropped(self) -> tuple[float, float]:
        """How much of the picture's width and of its height is cut off, each from 0 to 1."""
        left, top, right, bottom = self.box
        width, height = self.picture
        return 1 - (right - left) / width, 1 - (bottom - top) / height

    @property
    def offset(self) -> tuple[int, int]:
        """Left and top of the part in pixels of the resized picture."""
        whole = covering(self.picture, self.size)
        left, top = (round(s * w / p) for s, w, p in zip(self.box, whole, self.picture))
        return left, top

    @property
    def size_text(self) -> str:
        """The size in words: "448 x 576", of a square its side."""
        width, height = self.size
        return str(width) if width == height else f"{width} x {height}"

    @property
    def enlarges(self) -> bool:
        """Whether the picture has fewer pixels than it is resized to."""
        scaled = covering(self.picture, self.size)
        return scaled[0] > self.picture[0] or scaled[1] > self.picture[1]


def frame(
    picture: tuple[int, int], size: tuple[int, int], generator: torch.Generator | None = None
) -> Frame:
    """The middle of a picture in the shape of ``size``, as large as it can be.

    Args:
        picture: width and height.
        size: width and height of what is to come of it.
        generator: draws another place than the middle.
    """
    scaled = covering(picture, size)
    spare = [whole - kept for whole, kept in zip(scaled, size)]
    if generator is None:
        left, top = (rest // 2 for rest in spare)
    else:
        left, top = (int(torch.randint(0, rest + 1, (), generator=generator)) for rest in spare)
    across, down = (side / whole for side, whole in zip(picture, scaled))
    box = (
        left * across,
        top * down,
        min((left + size[0]) * across, picture[0]),
        min((top + size[1]) * down, picture[1]),
    )
    return Frame(picture, size, box)


def covering(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The picture's size when it just covers ``size``, never below it on either side."""
    across = size[0] * picture[1] >= size[1] * picture[0]
    wanted, whole = (size[0], picture[0]) if across else (size[1], picture[1])
    width, height = (max(least, round(side * wanted / whole)) for least, side in zip(size, picture))
    return width, height


def buckets(resolution: int, step: int) -> list[tuple[int, int]]:
    """Sizes that photos can be trained at: the square, and others of about its area.

    Args:
        resolution: side of the square in pixels.
        step: of which the other sizes' sides are multiples, see ``bucket_step``.
    """
    sides = range(step, LARGEST_ASPECT * resolution + 1, step)
    least, most = (int(share * resolution**2) for share in AREAS)
    return [(resolution, resolution)] + [
        (width, height)
        for width in sides
        for height in sides
        if least <= width * height <= most
        and width != height
        and max(width, height) <= LARGEST_ASPECT * min(width, height)
    ]


def nearest_bucket(picture: tuple[int, int], resolution: int, step: int) -> tuple[int, int]:
    """The bucket in which least of a picture is cropped, and of two such the larger one.

    None is taken in which the picture would be resized to more pixels than for the square.
    """
    least_side = min(picture)

    def kept(size: tuple[int, int]) -> Fraction:
        across, down = size[0] * picture[1], size[1] * picture[0]
        return Fraction(min(across, down), max(across, down))

    fitting = [
        size
        for size in buckets(resolution, step)
        if all(side * least_side <= resolution * whole for side, whole in zip(size, picture))
    ]
    return max(fitting, key=lambda size: (kept(size), size[0] * size[1]))


def bucket_step(resolution: int, latent_scale: int, unet_levels: int) -> int:
    """What the sides of buckets are multiples of, in pixels.

    A UNet halves latents ``unet_levels - 1`` times, and images are usually generated at sizes that
    all these halvings divide: multiples of 64 for Stable Diffusion 1.5. A small square would have
    hardly any bucket at such steps; there an eighth of its side is taken, and the UNet pads.

    Args:
        resolution: side of the square in pixels.
        latent_scale: pixels for each latent, 8 for Stable Diffusion 1.5.
        unet_levels: resolutions at which the UNet works, 4 for Stable Diffusion 1.5.
    """
    eighth = resolution // 8 // latent_scale * latent_scale
    return max(latent_scale, min(latent_scale * 2 ** (unet_levels - 1), eighth))


def crop_note(names: Sequence[str], frames: Sequence[Frame]) -> str | None:
    """A sentence that says what of which photo is cropped; None where nothing is."""
    parts = []
    for name, part in zip(names, frames, strict=True):
        share, side = max(zip(part.cropped, ("width", "height")))
        if share >= WORTH_SAYING:
            parts.append(f"{100 * share:.0f} % of the {side} of {name}")
    return f"cropped: {listed(parts)}" if parts else None


def listed(parts: Sequence[str], most: int = 12) -> str:
    """Some words with commas between; of many, the first and how many more there are."""
    rest = len(parts) - most
    return ", ".join(parts[:most]) + (f" and {rest} more" if rest > 0 else "")


def enlarged_notes(names: Sequence[str], frames: Sequence[Frame]) -> tuple[str, ...]:
    """A sentence for each photo that has fewer pixels than it is trained at."""
    return tuple(
        f"{name} has {part.picture[0]} x {part.picture[1]} pixels and is enlarged to "
        f"{part.size_text}: it teaches the blur too. A larger original is better."
        for name, part in zip(names, frames, strict=True)
        if part.enlarges
    )
