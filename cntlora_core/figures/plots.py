"""Plots of a run: its loss and its ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cntlora_core.figures.sheets import running_mean
from cntlora_core.runtime.files import atomic_write

Value = TypeVar("Value")

_PROJECTIONS = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out", "to_out": "out", "o_proj": "out",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out",
    "query": "q", "key": "k", "value": "v",
}  # fmt: skip


def plot_loss(history: Sequence[Mapping[str, float]], path: Path, title: str = "") -> None:
    """Loss and gradient norm against steps, with a running mean."""
    save_figure(_loss_figure(history, title), path)


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
            left.plot(steps, running_mean(values), color=colour, label=label)
    held_out = [(i, r["held_out_loss"]) for i, r in enumerate(history, 1) if "held_out_loss" in r]
    if held_out:
        left.plot(
            *zip(*held_out, strict=True), "o-", color="#3c8d40", markersize=3, label="held out"
        )
    left.set(xlabel="step", ylabel="denoising loss", yscale="log", title=title or "loss")
    left.legend(frameon=False)
    norms = np.array([record["grad_norm"] for record in history])
    right.plot(steps, norms, color="#666666", alpha=0.18, linewidth=0.8)
    right.plot(steps, running_mean(norms), color="#444444")
    right.set(xlabel="step", ylabel="gradient norm", yscale="log", title="gradient norm")
    return figure


def curve_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str = ""
) -> Figure:
    """One panel for each quantity, in it one line of (step, value) for each run.

    More runs than there are colours differ by their dashes too, and are named beside the panels.
    """
    figure, axes = _panels(len(panels), title, columns=2)
    for axis, (quantity, lines) in zip(axes, panels.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            if points:
                marker = "o" if len(points) < 40 else None
                style = ("-", "--", ":")[i // 10 % 3]
                axis.plot(
                    *zip(*points, strict=True), style, color=f"C{i % 10}", marker=marker,
                    markersize=3, label=name,
                )  # fmt: skip
        axis.set(xlabel="step", ylabel=quantity.replace("_", " "))
    first = axes[0].get_legend_handles_labels()
    if len(first[0]) > 10:
        figure.legend(*first, frameon=False, fontsize=8, loc="outside right upper")
        return figure
    for axis in axes:
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    return figure


def plot_ranks(ranks: Mapping[str, int], path: Path, title: str = "") -> None:
    """Rank against depth: one line for each projection, one panel for each part of the model."""
    save_figure(_rank_figure(ranks, title), path)


def rank_picture(ranks: Mapping[str, int], title: str = "") -> Image.Image:
    """What :func:`plot_ranks` writes, as a picture."""
    return _picture(_rank_figure(ranks, title))


def _rank_figure(ranks: Mapping[str, int], title: str) -> Figure:
    panels = rank_lines(ranks)
    figure, axes = _panels(len(panels), title)
    top = max(ranks.values())
    for axis, (part, lines) in zip(axes, panels.items(), strict=True):
        for projection, values in lines.items():
            axis.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=projection)
        axis.set(title=part, xlabel="depth", ylabel="rank", ylim=(0, 1.08 * top))
        axis.legend(frameon=False, fontsize=8)
    return figure


def plot_spectra(
    spectra: Mapping[str, Sequence[float]],
    path: Path,
    title: str = "",
    relative_norms: Mapping[str, float] | None = None,
) -> None:
    """Two panels for each part of a model: its layers' singular values, and their norms by depth.

    Args:
        spectra: Singular values of each layer's delta, descending.
        path: Of the picture.
        title: Above it.
        relative_norms: Norms relative to the frozen weights, drawn in place of the norms where
            all are given.
    """
    panels = lines_by_depth(spectra)
    norms = {name: float(np.linalg.norm(values)) for name, values in spectra.items()}
    relative = relative_norms is not None and relative_norms.keys() == spectra.keys()
    norm_panels = lines_by_depth(relative_norms if relative and relative_norms else norms)
    figure, axes = _panels(2 * len(panels), title, columns=2)
    for i, (part, lines) in enumerate(panels.items()):
        left, right = axes[2 * i], axes[2 * i + 1]
        for j, (projection, layers) in enumerate(lines.items()):
            label: str | None = projection
            for values in layers:
                array = np.asarray(values, dtype=float)
                array = array[array > 1e-7 * array[:1].sum()]
                left.plot(
                    np.arange(1, len(array) + 1), array, color=f"C{j % 10}", alpha=0.55,
                    linewidth=0.9, label=label,
                )  # fmt: skip
                label = None
            heights = norm_panels[part][projection]
            right.plot(
                range(1, len(heights) + 1), heights, marker="o", markersize=3, label=projection
            )
        left.set(title=part, xlabel="direction", ylabel="singular value", yscale="log")
        right.set(title=part, xlabel="depth", ylim=(0, None))
        right.set(ylabel="norm of delta / norm of weight" if relative else "norm of delta")
        left.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def rank_lines(ranks: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
    """Ranks by part of the model and projection, each in order of depth."""
    return lines_by_depth(ranks)


def lines_by_depth(values: Mapping[str, Value]) -> dict[str, dict[str, list[Value]]]:
    """What each attachment point has, by part of the model and projection, in order of depth."""
    panels: dict[str, dict[str, list[Value]]] = {}
    for name in sorted(values, key=lambda name: _depth(_dotted(name))):
        dotted = _dotted(name)
        projection = next(
            (p for p in _PROJECTIONS if dotted.endswith("." + p)), dotted.rpartition(".")[2]
        )
        part = dotted[: -len(projection) - 1]
        panels.setdefault(_part_title(part), {}).setdefault(
            _PROJECTIONS.get(projection, projection), []
        ).append(values[name])
    order = list(dict.fromkeys(_PROJECTIONS.values()))  # q, k, v, out: the same colours everywhere
    return {
        part: {p: lines[p] for p in [*order, *lines] if p in lines}
        for part, lines in panels.items()
    }


def _dotted(name: str) -> str:
    """A name with its numbers and its projection set apart by dots, as kohya's are not."""
    if "." in name:
        return name
    name = re.sub(r"_(\d+)(?=_|$)", r".\1", name).removeprefix("lora_")
    name = re.sub(r"(?<=\d)_", ".", name)
    for projection in _PROJECTIONS:
        flat = "_" + projection.replace(".", "_")
        if name.replace(".", "_").endswith(flat):
            return f"{name[: -len(flat)]}.{projection}"
    return name


def _panels(count: int, title: str, columns: int = 3) -> tuple[Figure, list[Any]]:
    """A figure with this many panels in rows, and their axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[count:]:
        axis.set_axis_off()
    if title:
        figure.suptitle(title)
    return figure, axes[:count]


def _part_title(path: str) -> str:
    if path.startswith("unet."):
        kinds = {"attn1": "self-attention", "attn2": "cross-attention", "resnets": "convolutions"}
        words = path.split(".")
        return next((f"UNet {kind}" for word, kind in kinds.items() if word in words), "UNet")
    if path.startswith("text_encoder."):
        return "text encoder"
    if path.startswith("text_encoder_2."):
        return "text encoder 2"
    return re.sub(r"\.?\b\d+\b", "", path) or "all"


def _depth(name: str) -> list[tuple[int, int, str]]:
    if "mid_block" in name or "middle_block" in name:
        stage = 1
    else:
        stage = 2 if "up_blocks" in name or "output_blocks" in name else 0
    pieces = [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
    return [(stage, 0, "")] + [(0, number, text) for number, text in pieces]


def _picture(figure: Figure) -> Image.Image:
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
