"""Plots of a run: its loss and its ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from cntlora_core.files import atomic_write
from cntlora_core.sheets import running_mean

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
            left.plot(steps, running_mean(values), color=colour, label=label)
    left.set(xlabel="step", ylabel="denoising loss", yscale="log", title=title or "loss")
    left.legend(frameon=False)
    norms = np.array([record["grad_norm"] for record in history])
    right.plot(steps, norms, color="#666666", alpha=0.18, linewidth=0.8)
    right.plot(steps, running_mean(norms), color="#444444")
    right.set(xlabel="step", ylabel="gradient norm", yscale="log", title="gradient norm")
    return figure


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


def _picture(figure: Figure) -> Image.Image:
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
