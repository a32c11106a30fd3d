"""Draw the loss of training runs.

``python -m cntlora_core.mini.making.curves RUN ... --output PNG``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from cntlora_core.runtime.files import atomic_write

__all__ = ["plot_curves", "read_log"]


def read_log(run: Path) -> list[dict[str, float]]:
    """The entries of a run's ``log.jsonl``: step, loss, learning rate, seconds.

    A run that was resumed from an earlier state has steps twice; the later entry counts.

    Raises:
        FileNotFoundError: the folder is of no run.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no log.jsonl in {run}: give the --output of a training script")
    entries = (json.loads(line) for line in path.read_text("utf-8").splitlines() if line)
    by_step = {entry["step"]: entry for entry in entries}
    return [by_step[step] for step in sorted(by_step)]


def plot_curves(runs: Sequence[tuple[str, Path]], output: Path) -> None:
    """One panel a run: loss, with the learning rate over its peak behind it.

    Args:
        runs: title and output folder of each.
        output: PNG.
    """
    figure = Figure(figsize=(3.1 * len(runs), 2.6), layout="constrained")
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    for axis, (title, run) in zip(axes, runs, strict=True):
        log = read_log(run)
        steps, losses = [entry["step"] for entry in log], [entry["loss"] for entry in log]
        behind = axis.twinx()
        peak = max(entry["rate"] for entry in log)
        behind.fill_between(steps, [e["rate"] / peak for e in log], color="#9db4c8", alpha=0.3)
        behind.set(ylim=(0, 1.05), yticks=[])
        axis.set_zorder(behind.get_zorder() + 1)
        axis.patch.set_visible(False)
        axis.plot(steps, losses, color="#2f6db5", linewidth=1.2)
        axis.set(yscale="log", xlabel="step")
        axis.yaxis.set_major_formatter("{x:g}")
        few = max(losses) < 20 * min(losses)  # else labels between the decades overlap
        axis.yaxis.set_minor_formatter("{x:g}" if few else NullFormatter())
        minutes = log[-1]["seconds"] / 60
        axis.set_title(f"{title}, {minutes:.0f} min", fontsize=9, loc="left")
        axis.tick_params(labelsize=7, which="both")
    axes[0].set_ylabel("loss", fontsize=8)
    FigureCanvasAgg(figure)
    with atomic_write(output) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of training scripts")
    parser.add_argument("--titles", nargs="+", help="of the runs; default: their folders' names")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    titles = args.titles or [run.name for run in args.runs]
    if len(titles) != len(args.runs):
        parser.error(f"{len(args.runs)} runs but {len(titles)} titles")
    plot_curves(list(zip(titles, args.runs, strict=True)), args.output)


if __name__ == "__main__":
    main()
