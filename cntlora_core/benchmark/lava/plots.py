"""A picture of each experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cntlora_core.runtime.files import atomic_write

Rows = list[dict[str, Any]]
COLOURS = ("#9db4c8", "#666666", "#2f6db5", "#d98324", "#3c9a5f", "#a0522d", "#8a5fbf")


def plot_experiment(name: str, rows: Rows, path: Path) -> None:
    """Draw the rows of an experiment's summary."""
    figure = _PLOTS[name](rows)
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _panels(count: int, height: float = 3.4, width: float = 4.4):
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def _by(rows: Rows, *keys: str) -> dict[Any, Rows]:
    groups: dict[Any, Rows] = {}
    for row in rows:
        value = tuple(row[key] for key in keys)
        groups.setdefault(value[0] if len(keys) == 1 else value, []).append(row)
    return groups


def _bars(key: str) -> Callable[[Rows], Figure]:
    """Accuracy of each kind, one panel a network; parameters beneath the names."""

    def plot(rows: Rows) -> Figure:
        groups = _by(rows, "model")
        figure, axes = _panels(len(groups))
        for axis, (model, own) in zip(axes, groups.items(), strict=True):
            heights = [100 * row["accuracy"] for row in own]
            axis.bar(
                range(len(own)), heights, yerr=[100 * row["spread"] for row in own],
                color=COLOURS[: len(own)], capsize=3,
            )  # fmt: skip
            axis.set_xticks(
                range(len(own)),
                [f"{row[key]}\n{_short(row['trained'])}" for row in own],
                fontsize=7,
            )
            low = min(heights)
            axis.set(title=model, ylabel="accuracy, %", ylim=(max(0, low - 10), None))
        return figure

    return plot


def _short(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.1f}k"


def _robustness(rows: Rows) -> Figure:
    figure, (left, right) = _panels(2, width=5)
    for colour, (model, own) in zip(COLOURS[2:], _by(rows, "model").items()):
        for axis, what in ((left, "strength"), (right, "rank")):
            chosen = [row for row in own if row["varied"] == what and row["value"] > 0]
            axis.errorbar(
                [row["value"] for row in chosen],
                [100 * row["accuracy"] for row in chosen],
                yerr=[100 * row["spread"] for row in chosen],
                marker="o", markersize=4, capsize=3, color=colour, label=model,
            )  # fmt: skip
            for row in own:
                if what == "strength" and row["varied"] == what and row["value"] == 0:
                    axis.axhline(100 * row["accuracy"], color=colour, linestyle=":", linewidth=1)
    left.set_xscale("log", base=2)
    left.set(xlabel="strength over the base (dotted: none)", ylabel="accuracy, %")
    right.set(xlabel="rank", ylabel="accuracy, %")
    left.legend(frameon=False)
    return figure


def _variance(rows: Rows) -> Figure:
    groups = _by(rows, "model", "start")
    figure, axes = _panels(len(groups))
    for axis, ((model, initialization), own) in zip(axes, groups.items(), strict=True):
        for colour, row in zip(COLOURS[2:], own):
            axis.plot(
                row["steps"], row["course"], marker="o", markersize=3, color=colour,
                label=f"strength {row['strength']:g}",
            )  # fmt: skip
        axis.set(title=f"{model}, initialisation: {initialization}", xlabel="step", yscale="log")
        axis.set_ylabel("variance of the gradient of V")
        axis.legend(frameon=False, fontsize=8)
    return figure


def _spectrum(rows: Rows) -> Figure:
    groups = _by(rows, "model")
    figure, axes = _panels(len(groups))
    for axis, (model, own) in zip(axes, groups.items(), strict=True):
        for colour, row in zip(COLOURS[2:], own):
            values = [max(value, 1e-8) for value in row["middle"]]
            axis.plot(range(1, len(values) + 1), values, color=colour, label=row["method"])
        axis.set(title=model, xlabel="index", ylabel="singular value over the largest")
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=8)
    return figure


def _initializations(rows: Rows) -> Figure:
    groups = _by(rows, "model", "rate")
    figure, axes = _panels(len(groups))
    for axis, ((model, learning_rate), own) in zip(axes, groups.items(), strict=True):
        for colour, row in zip(COLOURS, own):
            steps, values = zip(*row["curve"])
            axis.plot(steps, [100 * v for v in values], color=colour, label=row["start"])
        axis.set(
            title=f"{model}, learning rate {learning_rate:g}", xlabel="step", ylabel="accuracy, %"
        )
        axis.legend(frameon=False, fontsize=8)
    return figure


def _cost(rows: Rows) -> Figure:
    groups = _by(rows, "case")
    figure, axes = _panels(len(groups))
    for axis, (case, own) in zip(axes, groups.items(), strict=True):
        axis.bar(range(len(own)), [row["over_lora"] for row in own], color=COLOURS[: len(own)])
        axis.set_xticks(range(len(own)), [row["method"].replace(" ", "\n") for row in own])
        axis.axhline(1.0, color="#444444", linewidth=0.8)
        axis.axhline(1.2, color="#444444", linewidth=0.8, linestyle=":")
        axis.set(title=case, ylabel="time of a step over LoRA's")
    return figure


_PLOTS: dict[str, Callable[[Rows], Figure]] = {
    "structure": _bars("method"),
    "factors": _bars("factors"),
    "robustness": _robustness,
    "variance": _variance,
    "spectrum": _spectrum,
    "starts": _initializations,
    "cost": _cost,
}
