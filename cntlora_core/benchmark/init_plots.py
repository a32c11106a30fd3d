"""Pictures of what ``cntlora bench init`` measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cntlora_core.runtime.files import atomic_write

_FORWARD, _ALGEBRA = "#9db4c8", "#2f6db5"
PHASES = {"forwards": "#9db4c8", "sums": "#d98324", "linear algebra": "#2f6db5"}


def plot_cases(result: Mapping[str, Any], path: Path) -> None:
    """For each case: seconds of each initialisation, by forward passes and linear algebra."""
    cases = result["cases"]
    figure = Figure(figsize=(9, 1.0 + 1.35 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axis, case in zip(axes, cases.values(), strict=True):
        summary = case["summary"]
        for row, found in enumerate(summary.values()):
            algebra = found.get("linear_algebra_seconds")
            if algebra is None:
                axis.text(0.01, row, f"  {found.get('failed', 'no result')[:80]}", va="center")
                continue
            ended = "total_seconds" in found
            total = found["total_seconds"] if ended else found["limit"]
            passes = max(total - algebra, 0.0)
            axis.barh(row, passes, color=_FORWARD, label="" if row else "forward passes")
            axis.barh(
                row, total - passes, left=passes, color=_ALGEBRA, hatch=None if ended else "//",
                label="" if row else "linear algebra", edgecolor="white",
            )  # fmt: skip
            said = f" {total:.1f} s" if ended else f" did not end in {total:g} s"
            if "times_faster" in found:
                said += f", linear algebra {found['times_faster']:.1f} times ours"
            axis.text(total, row, said, va="center", fontsize=8)
        axis.set_yticks(range(len(summary)), list(summary))
        axis.margins(x=0.45)
        axis.set_ylim(len(summary) - 0.4, -0.6)
        axis.set_xlim(left=0)
        axis.set_title(case["title"], fontsize=9, loc="left")
        axis.set_xlabel("seconds")
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def plot_scaling(result: Mapping[str, Any], path: Path) -> None:
    """Seconds of each phase against what grows, both on logarithmic axes; one panel for each."""
    sweeps = result["sweeps"]
    figure = Figure(figsize=(4.6 * 2, 3.8 * -(-len(sweeps) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(sweeps) // 2), 2, squeeze=False).ravel().tolist()
    for axis in axes[len(sweeps) :]:
        axis.set_axis_off()
    for axis, (variable, sweep) in zip(axes, sweeps.items()):
        values = [point["value"] for point in sweep["points"]]
        for phase, colour in PHASES.items():
            seconds = [point["seconds"][phase] for point in sweep["points"]]
            exponent = sweep["exponents"][phase]
            label = f"{phase}, ~ {variable}^{exponent:.1f}"
            axis.plot(values, seconds, color=colour, marker="o", markersize=3, label=label)
        axis.set(xscale="log", yscale="log", xlabel=variable, ylabel="seconds")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_title(f"bounded by {sweep['bounded_by']}", fontsize=9)
        axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
