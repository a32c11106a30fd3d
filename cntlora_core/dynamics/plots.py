"""Plots of training dynamics, of one run or of several over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cntlora_core.dynamics.log import Record
from cntlora_core.dynamics.token_moments import ALL, TEXT, VISUAL
from cntlora_core.figures.plots import save_figure
from cntlora_core.figures.sheets import running_mean

_WINDOW = 20  # steps of the running mean
_STYLES = {VISUAL: "o-", TEXT: "s--", ALL: "o-"}


def plot_dynamics(runs: Mapping[str, Sequence[Record]], path: str | Path, title: str = "") -> Path:
    """Loss, gradient norms and update-to-weight ratios by group, and second moments by layer.

    Args:
        runs: What :func:`.read_dynamics` gives, by the runs' names; each has a colour.
        path: Of the picture, a PNG.
        title: Above it.

    Raises:
        ValueError: if there is no record to plot.
        OSError: as :func:`.atomic_write`.
    """
    if not any(runs.values()):
        raise ValueError("there are no records to plot")
    save_figure(_figure(runs, title), Path(path))
    return Path(path)


def _figure(runs: Mapping[str, Sequence[Record]], title: str) -> Figure:
    named = [r.get("grad_norms", {}) for records in runs.values() for r in records[:1]]
    groups = list(dict.fromkeys(group for found in named for group in found))
    columns = max(2, len(groups))
    figure = Figure(figsize=(4.2 * columns, 13.6), layout="constrained")
    grid = figure.add_gridspec(4, 2 * columns)
    for row, left, right in ((0, _plot_loss, _plot_norm), (3, _plot_moments, _plot_ratios)):
        left(figure.add_subplot(grid[row, :columns]), runs)
        right(figure.add_subplot(grid[row, columns:]), runs)
    for row, key, label in (
        (1, "grad_norms", "gradient norm"),
        (2, "update_ratios", "update-to-weight ratio"),
    ):
        for i, group in enumerate(groups):
            axis = figure.add_subplot(grid[row, 2 * i : 2 * i + 2])
            _by_step(axis, runs, (key, group))
            axis.set(title=f"{label}: {group}", xlabel="step", yscale="log")
    if title:
        figure.suptitle(title)
    names = figure.axes[1].get_legend_handles_labels()  # of gradient norms, which all runs have
    figure.legend(*names, frameon=False, loc="outside lower center", ncols=2 * columns)
    return figure


def _plot_loss(axis: Axes, runs: Mapping[str, Sequence[Record]]) -> None:
    _by_step(axis, runs, ("loss",))
    axis.set(title="loss", xlabel="step")


def _plot_norm(axis: Axes, runs: Mapping[str, Sequence[Record]]) -> None:
    _by_step(axis, runs, ("grad_norm",))
    axis.set(title="gradient norm", xlabel="step", yscale="log")


def _plot_moments(axis: Axes, runs: Mapping[str, Sequence[Record]]) -> None:
    for i, (name, records) in enumerate(runs.items()):
        moments = _latest_moments(records)
        for kind, style in _STYLES.items():
            places = [(j, found[kind]) for j, found in enumerate(moments) if found.get(kind)]
            if places:
                label = name if kind == ALL else f"{name}, {kind}"
                axis.plot(
                    *zip(*places, strict=True), style, color=f"C{i % 10}", label=label,
                    markersize=3, linewidth=0.9,
                )  # fmt: skip
    axis.set(title="second moment", xlabel="adapted layer", ylabel="mean square", yscale="log")
    kinds = {str(line.get_label()).rpartition(", ")[2]: line for line in axis.lines}
    if kinds.keys() >= {VISUAL, TEXT}:
        axis.legend([kinds[VISUAL], kinds[TEXT]], [VISUAL, TEXT], frameon=False)


def _plot_ratios(axis: Axes, runs: Mapping[str, Sequence[Record]]) -> None:
    for i, (name, records) in enumerate(runs.items()):
        places = [
            (j, found[VISUAL] / found[TEXT])
            for j, found in enumerate(_latest_moments(records))
            if found.get(VISUAL) and found.get(TEXT)
        ]
        if places:
            axis.plot(
                *zip(*places, strict=True), "o-", color=f"C{i % 10}", label=name, markersize=3
            )
    if not axis.lines:
        axis.remove()
        return
    axis.set(title="second moment: visual / text", xlabel="adapted layer", yscale="log")
    axis.axhline(1.0, color="#888888", linewidth=0.7)


def _latest_moments(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The last second moments, by layer; of layers that read the same, queries and keys, one."""
    found = next((r["second_moments"] for r in reversed(records) if "second_moments" in r), {})
    kept: list[dict[str, Any]] = []
    for moments in found.values():
        if not kept or kept[-1] != moments:
            kept.append(moments)
    return kept


def _by_step(axis: Axes, runs: Mapping[str, Sequence[Record]], key: tuple[str, ...]) -> None:
    """A line for each run, with its running mean."""
    for i, (name, records) in enumerate(runs.items()):
        known = [(record["step"], _at(record, key)) for record in records]
        points = [(step, value) for step, value in known if value is not None]
        if points:
            steps, values = (np.array(column, float) for column in zip(*points, strict=True))
            axis.plot(steps, values, color=f"C{i % 10}", alpha=0.2, linewidth=0.8)
            axis.plot(steps, running_mean(values, _WINDOW), color=f"C{i % 10}", label=name)


def _at(record: Record, key: tuple[str, ...]) -> Any:
    value: Any = record
    for word in key:
        value = value.get(word) if isinstance(value, dict) else None
    return value
