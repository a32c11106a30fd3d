"""Pictures of a run: its loss, its ranks, and what the model draws before and after."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cntlora_core.files import atomic_write

_PROJECTIONS = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out", "to_out": "out",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out",
    "query": "q", "key": "k", "value": "v",
}  # fmt: skip


def plot_loss(history: Sequence[Mapping[str, float]], path: Path, title: str = "") -> None:
    """Loss and gradient norm against steps, with a running mean."""
    _save(_loss_figure(history, title), path)


def loss_picture(history: Sequence[Mapping[str, float]], title: str = "") -> Image.Image:
    """What :func:`plot_loss` writes, as a picture."""
    return _picture(_loss_figure(history, title))


def _loss_figure(history: Sequence[Mapping[str, float]], title: str) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(history) + 1)
    for key, label, colour in (
        ("instance_loss", "subject", "#2f6db5"),
        ("prior_loss", "class", "#d98324"),
    ):
        values = np.array([record[key] for record in history])
        if values.any():
            left.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
            left.plot(steps, _running_mean(values), color=colour, label=label)
    left.set(xlabel="step", ylabel="denoising loss", yscale="log", title=title or "loss")
    left.legend(frameon=False)
    norms = np.array([record["grad_norm"] for record in history])
    right.plot(steps, norms, color="#666666", alpha=0.18, linewidth=0.8)
    right.plot(steps, _running_mean(norms), color="#444444")
    right.set(xlabel="step", ylabel="gradient norm", yscale="log", title="gradient norm")
    return figure


def loss_thumbnail(losses: Sequence[float], steps: int, width: int = 384) -> Image.Image:
    """A running mean of the loss so far, quick enough to be drawn while training.

    Args:
        losses: One for each step done, at least one.
        steps: How many there will be; the axis has room for all of them.
        width: Of the picture in pixels; it is half as high.
    """
    height, margin = width // 2, 22
    means = _running_mean(np.asarray(losses, dtype=np.float64))
    low, high = float(means.min()), float(means.max())
    x = margin + (width - 2 * margin) * np.arange(1, len(means) + 1) / max(steps, len(means))
    y = height - margin - (height - 2 * margin) * (means - low) / (high - low or 1.0)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(11)
    pen.line(
        [(margin, margin), (margin, height - margin), (width - margin, height - margin)], "grey"
    )
    pen.line(list(zip(x.tolist(), y.tolist())), fill="#2f6db5", width=2)
    text = f"loss {means[-1]:.4f}   step {len(losses)} of {steps}"
    pen.text((margin + 6, 4), text, fill="black", font=font)
    return picture


def plot_ranks(ranks: Mapping[str, int], path: Path, title: str = "") -> None:
    """Rank against depth: one line for each projection, one panel for each part of the model."""
    _save(_rank_figure(ranks, title), path)


def rank_picture(ranks: Mapping[str, int], title: str = "") -> Image.Image:
    """What :func:`plot_ranks` writes, as a picture."""
    return _picture(_rank_figure(ranks, title))


def _rank_figure(ranks: Mapping[str, int], title: str) -> Figure:
    panels = rank_lines(ranks)
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (part, lines) in zip(axes, panels.items(), strict=True):
        for projection, values in lines.items():
            axis.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=projection)
        axis.set(title=part, xlabel="depth")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set(ylabel="rank")
    if title:
        figure.suptitle(title)
    return figure


def rank_lines(ranks: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
    """Ranks by part of the model and projection, each in order of depth."""
    panels: dict[str, dict[str, list[int]]] = {}
    for name in sorted(ranks, key=_depth):
        projection = next(
            (p for p in _PROJECTIONS if name.endswith("." + p)), name.rpartition(".")[2]
        )
        part = name[: -len(projection) - 1]
        panels.setdefault(_part_title(part), {}).setdefault(
            _PROJECTIONS.get(projection, projection), []
        ).append(ranks[name])
    return panels


def _part_title(path: str) -> str:
    if path.startswith("unet."):
        return (
            "UNet self-attention"
            if path.endswith("attn1")
            else ("UNet cross-attention" if path.endswith("attn2") else "UNet")
        )
    if path.startswith("text_encoder."):
        return "text encoder"
    return re.sub(r"\.?\b\d+\b", "", path)


def _depth(name: str) -> list[tuple[int, int, str]]:
    stage = 1 if "mid_block" in name else 2 if "up_blocks" in name else 0
    pieces = [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
    return [(stage, 0, "")] + [(0, number, text) for number, text in pieces]


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
    font = ImageFont.load_default(13)
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
        resample = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
        sheet.paste(ImageOps.fit(image.convert("RGB"), (side, side), resample), (x, y))

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


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all; the format is that of the file's ending."""
    with atomic_write(path) as temporary:
        image.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])


def _running_mean(values: np.ndarray, window: int = 50) -> np.ndarray:
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def contact_sheet(pictures: Sequence[Image.Image], *, side: int = 128) -> Image.Image:
    """Pictures side by side in rows, each fitted into a square of ``side`` pixels."""
    columns = max(1, math.ceil(math.sqrt(len(pictures))))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, picture in enumerate(pictures):
        fitted = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        sheet.paste(fitted, ((i % columns) * side, (i // columns) * side))
    return sheet


def _picture(figure: Figure) -> Image.Image:
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
