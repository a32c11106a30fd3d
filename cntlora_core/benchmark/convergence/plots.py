"""Plots of a comparison: metrics against steps, the trade-off, and images by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from cntlora_core.benchmark.convergence.results import METRIC, METRICS, Config, Metric, Pair
from cntlora_core.figures.sheets import comparison_sheet, save_image
from cntlora_core.runtime.files import atomic_write

IMAGES_SHOWN = 4
"""Images of each run in the sheet by step: the first seed of the first prompts."""


def plot_courses(configs: Sequence[Config], path: Path) -> bool:
    """Each metric against steps: means, and 95 % intervals as bands. False if there is nothing."""
    shown = [m for m in METRICS if any(len(c.steps(m.name)) > 1 for c in configs)]
    if not shown:
        return False
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines + 1), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axis, metric in zip(axes, shown):
        for colour, config in zip(_colours(len(configs)), configs, strict=True):
            steps, means, widths = _course(config, metric)
            if not steps:
                continue
            axis.plot(steps, means, color=colour, marker=".", label=config.label)
            low, high = np.array(means) - widths, np.array(means) + widths
            axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(title=metric.title, xlabel="step")
    for axis in axes[len(shown) :]:
        axis.axis("off")
    _legend(figure, axes[: len(shown)])
    _save(figure, path)
    return True


def plot_trade_off(configs: Sequence[Config], path: Path) -> bool:
    """DINO against right backgrounds (CLIP-T where there is no classifier): a curve over steps,
    with the 95 % intervals of the last one."""
    across = next((m for m in ("backgrounds", "clip_t") if any(c.steps(m) for c in configs)), None)
    if across is None:
        return False
    figure = Figure(figsize=(7.5, 5.6), layout="constrained")
    axis = figure.subplots()
    for colour, config in zip(_colours(len(configs)), configs, strict=True):
        known = {step: found for step, *found in zip(*_course(config, METRIC[across]))}
        points = [
            (*known[step], *found, step)
            for step, *found in zip(*_course(config, METRIC["dino"]))
            if step in known
        ]
        if not points:
            continue
        x, x_widths, y, y_widths, steps = zip(*points)
        axis.plot(x, y, color=colour, marker="o", markersize=4, label=config.label)
        axis.errorbar(
            *(x[-1], y[-1], y_widths[-1], x_widths[-1]), color=colour, alpha=0.35, linewidth=1
        )
        axis.annotate(str(steps[-1]), (x[-1], y[-1]), fontsize=7, color=colour)
    axis.set(xlabel=METRIC[across].title, ylabel="DINO")
    axis.set_title("up and to the right is better; the number is the last step")
    _legend(figure, [axis])
    _save(figure, path)
    return True


def save_images_by_step(configs: Sequence[Config], pair: Pair, path: Path) -> bool:
    """One line for each setting, one column for each step: the same images of one subject."""
    shown = [config for config in configs if pair in config.runs]
    steps = sorted({step for config in shown for step in _sheets(config.runs[pair])})
    if not steps:
        return False
    rows = []
    for config in shown:
        sheets = _sheets(config.runs[pair])
        per_prompt = config.runs[pair]["measure"]["per_prompt"]
        cells = [_first_column(sheets[s], per_prompt) if s in sheets else [] for s in steps]
        rows.append((config.label, cells))
    side = max(image.width for _, cells in rows for cell in cells for image in cell)
    save_image(comparison_sheet([], rows, [f"step {s}" for s in steps], side=side), path)
    return True


def _sheets(record: dict[str, Any]) -> dict[int, Path]:
    folder = Path(record["folder"])
    found = {r["step"]: folder / r["sheet"] for r in record["rows"] if "sheet" in r}
    return {step: path for step, path in found.items() if path.is_file()}


def _first_column(path: Path, per_prompt: int) -> list[Image.Image]:
    with Image.open(path) as sheet:
        side = sheet.width // per_prompt
        count = min(IMAGES_SHOWN, sheet.height // side)
        return [sheet.crop((0, i * side, side, (i + 1) * side)) for i in range(count)]


def _course(config: Config, metric: Metric) -> tuple[list[int], list[float], list[float]]:
    """Steps, means and half widths of the intervals, in the units of tables."""
    steps, means, widths = [], [], []
    for step in config.steps(metric.name):
        found = config.mean(metric.name, step)
        assert found is not None
        steps.append(step)
        means.append(metric.factor * found.mean)
        widths.append(metric.factor * (found.half_width or 0.0))
    return steps, means, widths


def _colours(count: int) -> list[Any]:
    palette = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(count)]


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = min(3, len(found))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, fontsize=8
    )


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
