"""Pictures put together with Pillow: sheets of pictures, and a quick course of the loss."""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from cntlora_core.runtime.files import atomic_write

if TYPE_CHECKING:
    from cntlora_core.data.framing import Frame
    from cntlora_core.data.photos import Photo


@functools.lru_cache
def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """The plots' font, DejaVu Sans as matplotlib brings it along; ``size`` in pixels."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / "DejaVuSans.ttf"), size)


def comparison_sheet(
    photos: Sequence[Image.Image],
    rows: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]],
    columns: Sequence[str],
    *,
    side: int = 160,
) -> Image.Image:
    """The subject's photos above, if any, then rows of pictures under labelled columns.

    Args:
        photos: The subject.
        rows: A label such as the prompt, and for each column the pictures that belong there.
        columns: A heading for each column.
        side: Side of a picture in pixels.
    """
    gap, label_width, line = 6, 190, 16
    font = caption_font(13)
    per_cell = max(len(cell) for _, cells in rows for cell in cells)
    column_width = per_cell * (side + gap) + 2 * gap
    headings = [textwrap.wrap(text, max(8, column_width // 8)) for text in columns]
    heading_height = max(1, *(len(lines) for lines in headings)) * line
    width = max(label_width + len(columns) * column_width, label_width + len(photos) * (side + gap))
    photos_height = side + 2 * gap if photos else 0
    height = photos_height + heading_height + 3 * gap + len(rows) * (side + gap)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)

    def put(image: Image.Image, x: int, y: int) -> None:
        fitted = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (x, y))

    y = gap
    if photos:
        pen.text((gap, y + side // 2), "photos of the subject", fill="black", font=font)
    for i, photo in enumerate(photos):
        put(photo, label_width + i * (side + gap), y)
    y += photos_height

    for i, lines in enumerate(headings):
        place = (label_width + i * column_width, y)
        pen.multiline_text(place, "\n".join(lines), fill="black", font=font)
    y += heading_height + gap
    for prompt, cells in rows:
        text = "\n".join(textwrap.wrap(prompt, 26))
        pen.multiline_text((gap, y + side // 3), text, fill="black", font=font)
        for i, cell in enumerate(cells):
            for j, image in enumerate(cell):
                put(image, label_width + i * column_width + j * (side + gap), y)
        y += side + gap
    return sheet


def before_and_after(
    photos: Sequence[Image.Image],
    rows: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]],
    columns: Sequence[str],
    below: Sequence[str],
    *,
    side: int = 112,
) -> Image.Image:
    """What a training changed: the subject's photos beside one large picture of each column, then
    rows of pictures.

    Args:
        photos: The subject: the first large, up to five others around it.
        rows: A prompt, and for each column its pictures; the very first of each column is the
            large one.
        columns: A heading for each column, that of the photos before them.
        below: What stands under each column, likewise.
        side: Side of a picture in the rows in pixels.
    """
    gap, margin = 6, 18
    large_font, font = caption_font(22), caption_font(19)
    count = len(rows[0][1][0])
    wide = count * (side + gap) - gap
    lefts = [margin + i * (wide + margin) for i in range(len(columns))]
    width = lefts[-1] + wide + margin

    def wrapped(text: str, own: ImageFont.FreeTypeFont) -> str:
        return "\n".join(_wrapped(text, own, wide))

    headings = [wrapped(text, large_font) for text in columns]
    footings = [wrapped(text, font) for text in below]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def tallest(texts: Sequence[str], own: ImageFont.FreeTypeFont) -> int:
        boxes = [pen.multiline_textbbox((0, 0), text, font=own) for text in texts]
        return math.ceil(max(box[3] for box in boxes))

    top = margin + tallest(headings, large_font) + 2 * gap
    first = top + wide + margin
    foot = first + len(rows) * (side + gap) + gap
    sheet = Image.new("RGB", (width, foot + tallest(footings, font) + margin), "white")
    pen = ImageDraw.Draw(sheet)

    def put(image: Image.Image, size: int, x: int, y: int) -> None:
        fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (x, y))

    for x, heading, footing in zip(lefts, headings, footings, strict=True):
        pen.multiline_text((x, margin), heading, fill="black", font=large_font)
        pen.multiline_text((x, foot), footing, fill="black", font=font)
    small = wide // 3
    put(photos[0], wide - small, margin, top)
    places = [(2, 0), (2, 1), (0, 2), (1, 2), (2, 2)]
    for (column, row), photo in zip(places, photos[1:], strict=False):
        put(photo, small, margin + column * (wide - small) // 2, top + row * (wide - small) // 2)
    for x, cell in zip(lefts[1:], rows[0][1], strict=True):
        put(cell[0], wide, x, top)
    for number, (label, cells) in enumerate(rows):
        y = first + number * (side + gap)
        label += "" if number else ", the first of each also above"
        pen.multiline_text((margin, y + side // 3), wrapped(label, font), fill="black", font=font)
        for x, cell in zip(lefts[1:], cells, strict=True):
            for j, image in enumerate(cell):
                put(image, side, x + j * (side + gap), y)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels or of one word, broken where the text has breaks too."""
    lines: list[str] = []
    for part in text.splitlines() or [""]:
        line = ""
        for word in part.split(" "):
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def contact_sheet(pictures: Sequence[Image.Image], *, side: int = 128) -> Image.Image:
    """Pictures side by side in rows, each fitted into a square of ``side`` pixels."""
    columns = max(1, math.ceil(math.sqrt(len(pictures))))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, picture in enumerate(pictures):
        fitted = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        sheet.paste(fitted, ((i % columns) * side, (i // columns) * side))
    return sheet


def photo_sheet(
    photos: Sequence[Photo],
    names: Sequence[str],
    frames: Sequence[Frame],
    *,
    masked: bool = True,
    side: int = 256,
) -> Image.Image:
    """What of each photo is trained on: outlined, what is cropped is dimmed, and what a mask keeps
    out is tinted. Of many photos, the first hundred.

    Args:
        photos: With their masks.
        names: What stands below each.
        frames: The part of each that is kept.
        masked: Whether masks count.
        side: Of the square that a photo is fitted into, in pixels.
    """
    gap, line, font = 8, 18, caption_font(12)
    together = list(zip(photos, names, frames, strict=True))[:100]
    columns = max(1, math.ceil(math.sqrt(len(together))))
    rows = math.ceil(len(together) / columns)
    wide, tall = side + gap, side + line + gap
    sheet = Image.new("RGB", (columns * wide + gap, rows * tall + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (photo, name, part) in enumerate(together):
        left, top = gap + (i % columns) * wide, gap + (i // columns) * tall
        scale = side / max(photo.image.size)
        size = (
            max(1, round(photo.image.width * scale)),
            max(1, round(photo.image.height * scale)),
        )
        picture = photo.image.resize(size, Image.Resampling.LANCZOS)
        if masked and photo.mask is not None:
            tinted = Image.blend(picture, Image.new("RGB", size, "#d03a8c"), 0.5)
            picture = Image.composite(picture, tinted, photo.mask.resize(size))
        x0, y0, x1, y1 = (round(edge * scale) for edge in part.box)
        dimmed = Image.blend(picture, Image.new("RGB", size, "white"), 0.7)
        dimmed.paste(picture.crop((x0, y0, x1, y1)), (x0, y0))
        sheet.paste(dimmed, (left, top))
        corners = (left + x0, top + y0, left + x1 - 1, top + y1 - 1)
        pen.rectangle(corners, outline="#2f6db5", width=2)
        label = f"{part.size[0]} x {part.size[1]}: {name}"
        pen.text((left, top + size[1] + 2), textwrap.shorten(label, 40), fill="black", font=font)
    return sheet


def loss_thumbnail(losses: Sequence[float], steps: int, width: int = 384) -> Image.Image:
    """A running mean of the loss so far, quick enough to be drawn while training.

    Args:
        losses: One for each step done, at least one.
        steps: How many there will be; the axis has room for all of them.
        width: Of the picture in pixels; it is half as high.
    """
    height, margin = width // 2, 22
    means = running_mean(np.asarray(losses, dtype=np.float64))
    low, high = float(means.min()), float(means.max())
    x = margin + (width - 2 * margin) * np.arange(1, len(means) + 1) / max(steps, len(means))
    y = height - margin - (height - 2 * margin) * (means - low) / (high - low or 1.0)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    font = caption_font(11)
    pen.line(
        [(margin, margin), (margin, height - margin), (width - margin, height - margin)], "grey"
    )
    pen.line(list(zip(x.tolist(), y.tolist())), fill="#2f6db5", width=2)
    text = f"loss {means[-1]:.4f}   step {len(losses)} of {steps}"
    pen.text((margin + 6, 4), text, fill="black", font=font)
    return picture


def running_mean(values: np.ndarray, window: int = 50) -> np.ndarray:
    """The mean of the last ``window`` values at each, (n,) to (n,)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def save_beside(image: Image.Image, path: Path) -> Path:
    """Write a picture as a PNG, and leave every other picture as it is.

    Args:
        image: The picture.
        path: Where it goes; a number is added to the name where another picture has it.

    Returns:
        The file that holds it; one that did so before is not written again.
    """
    for number in itertools.count(1):
        place = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not place.exists():
            save_image(image, place)
            return place
        if _is_picture(place, image):
            return place
    raise AssertionError("numbers do not end")


def _is_picture(path: Path, image: Image.Image) -> bool:
    try:
        with Image.open(path) as there:
            return (
                there.size == image.size
                and not ImageChops.difference(there.convert("RGB"), image.convert("RGB")).getbbox()
            )
    except Exception:  # Pillow's decoders raise anything on a damaged file
        return False


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all; the format is that of the file's ending."""
    with atomic_write(path) as temporary:
        image.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
