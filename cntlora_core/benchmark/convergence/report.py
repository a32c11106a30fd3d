"""``cntlora bench report``: tables and plots of the runs in a folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.filesize import decimal

from cntlora_core.benchmark.convergence.command import ConvergenceReport
from cntlora_core.benchmark.convergence.document import (
    Block,
    Heading,
    Paragraph,
    Picture,
    Table,
    write_document,
)
from cntlora_core.benchmark.convergence.plots import (
    plot_courses,
    plot_trade_off,
    save_images_by_step,
)
from cntlora_core.benchmark.convergence.results import (
    METRIC,
    METRICS,
    Config,
    Metric,
    Pair,
    baseline_of,
    configs_of,
    groups_of,
    load_records,
)
from cntlora_core.benchmark.convergence.statistics import Estimate, steps_to
from cntlora_core.runtime.files import require_writable_folder

REPORT_NAME, PLOTS_NAME = "report", "plots"
SUBJECTS_SHOWN = 3
"""Of how many subjects images are shown."""


def write_report(settings: ConvergenceReport) -> list[Path]:
    """Write the report of a folder's runs.

    Returns:
        The Markdown file and the HTML page.

    Raises:
        ValueError: if there is no finished run.
        OSError: if the folder cannot be written to.
    """
    records, failed = load_records(settings.folder)
    configs = configs_of(records)
    folder = require_writable_folder(settings.folder)
    blocks = [
        *_overview(records, failed, configs),
        *_at_the_end(configs),
        *_by_step(configs),
        *(b for name in settings.baselines for b in _against(name, configs)),
        *_steps_to(settings.baselines[0], configs),
        *_best_learning_rates(configs, METRIC[settings.choose_by]),
        *_price(configs),
        *_plots(folder, configs),
    ]
    return write_document(folder, REPORT_NAME, "Comparison of initialisations", blocks)


def _overview(
    records: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]], configs: Sequence[Config]
) -> Iterator[Block]:
    subjects = sorted({pair[0] for config in configs for pair in config.runs})
    seeds = sorted({pair[1] for config in configs for pair in config.runs})
    models = sorted({r["model"]["source"] for r in records})
    revisions = sorted({str(r["revision"]) for r in records})
    yield Paragraph(
        f"{len(records)} runs of {len(configs)} settings; model: {', '.join(models)}; subjects: "
        f"{', '.join(subjects)}; seeds: {', '.join(map(str, seeds))}; revision of the source: "
        f"{', '.join(revisions)}."
    )
    yield Paragraph(
        "Numbers are means with 95 % intervals by Student's t, over subjects: of the seeds of a "
        "subject the mean counts, except where there is one subject alone. DINO, "
        "CLIP-I and CLIP-T are cosines; higher is better, and so it is for backgrounds. The "
        "held-out loss, which is to fall, is the denoising loss on photos that are not trained on. "
        "The drift is the mean squared change of the prediction on class images under other "
        "prompts; 0 is the base model."
    )
    counts = {config.label: len(config.runs) for config in configs}
    if len(set(counts.values())) > 1:
        few = ", ".join(f"{label}: {n}" for label, n in counts.items() if n < max(counts.values()))
        yield Paragraph(f"Some settings have fewer runs than others ({few}).")
    for record in failed:
        run = record["settings"]
        yield Paragraph(
            f"Failed: {run['method']} at {run['learning_rate']:g}, {run['subject']}, seed "
            f"{run['seed']}: {record['error']}"
        )


def _at_the_end(configs: Sequence[Config]) -> Iterator[Block]:
    yield Heading("After the last step")
    metrics = _measured(configs)
    yield Table(
        ["", "runs", "steps", *(m.title for m in metrics)],
        [
            [
                config.label,
                str(len(config.runs)),
                str(config.total),
                *(_cell(config.mean(m.name, config.total), m) for m in metrics),
            ]
            for config in configs
        ],
    )


def _by_step(configs: Sequence[Config]) -> Iterator[Block]:
    yield Heading("By step")
    for metric in _measured(configs):
        steps = sorted({step for config in configs for step in config.steps(metric.name)})
        yield Heading(metric.title, 3)
        yield Table(
            ["step", *map(str, steps)],
            [
                [
                    config.label,
                    *(_cell(config.mean(metric.name, s), metric) for s in steps),
                ]
                for config in configs
            ],
        )


def _against(name: str, configs: Sequence[Config]) -> Iterator[Block]:
    """Paired differences from a baseline, at each step at which images were generated."""
    compared = [(c, b) for c in configs if (b := baseline_of(c, name, configs)) is not None]
    if not compared:
        return
    yield Heading(f"Differences from {name}")
    yield Paragraph(
        f"Mean difference from {name}, all else being equal, paired by subject and seed; a star "
        "where the 95 % interval leaves 0 out. Where the baseline has another learning rate, that "
        "is named."
    )
    metrics = _measured(configs)
    steps = sorted({s for c, b in compared for s in c.steps("dino") if s in b.steps("dino")})
    for step in steps:
        rows = []
        for config, baseline in compared:
            found = [config.difference(baseline, m.name, step) for m in metrics]
            if not any(found):
                continue
            label, learning_rate = config.label, baseline.settings["learning_rate"]
            if learning_rate != config.settings["learning_rate"]:
                label += f" ({baseline.method} at {learning_rate:g})"
            count = max(f.count for f in found if f is not None)
            cells = [_cell(f, m, signed=True) for f, m in zip(found, metrics, strict=True)]
            rows.append([label, str(count), *cells])
        yield Heading(f"After step {step}", 3)
        yield Table(["", "of", *(m.title for m in metrics)], rows)


def _steps_to(name: str, configs: Sequence[Config]) -> Iterator[Block]:
    compared = [(c, b) for c in configs if (b := baseline_of(c, name, configs)) is not None]
    metrics = [m for m in _measured(configs) if m.name in ("dino", "clip_i", "loss")]
    if not compared or not metrics:
        return
    yield Heading(f"Steps to the final value of {name}")
    yield Paragraph(
        f"After how many steps a run reaches what {name} has on the same subject and seed after "
        "its last step, interpolated between measured steps: the median of the runs, of which "
        "some may never do; in brackets how many do."
    )
    rows = []
    for config, baseline in compared:
        cells = []
        for metric in metrics:
            final = baseline.at(metric.name, baseline.total)
            found = [
                steps_to(
                    config.course(metric.name, pair),
                    final[pair],
                    higher_is_better=metric.higher_is_better,
                )
                for pair in config.runs
                if pair in final
            ]
            reached = [steps for steps in found if steps is not None]
            middle = median([math.inf if steps is None else steps for steps in found] or [math.inf])
            text = f"{middle:.0f}" if middle < math.inf else "never"
            cells.append(f"{text} ({len(reached)} of {len(found)})")
        rows.append([config.label, str(baseline.total), *cells])
    yield Table(["", f"steps of {name}", *(m.title for m in metrics)], rows)


def _best_learning_rates(configs: Sequence[Config], by: Metric) -> Iterator[Block]:
    """Each method at the learning rate that is best by one metric, all else being equal."""
    groups: dict[str, list[tuple[float, Config]]] = {}
    for config in configs:
        found = config.mean(by.name, config.total)
        if found is None:
            continue
        settings = {k: v for k, v in config.settings.items() if k != "learning_rate"}
        sign = -1.0 if by.higher_is_better else 1.0
        groups.setdefault(str(sorted(settings.items())), []).append((sign * found.mean, config))
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return
    yield Heading("Each at its best learning rate")
    yield Paragraph(f"The best by {by.title} after the last step.")
    best = [min(group, key=lambda scored: scored[0])[1] for group in several]
    metrics = _measured(configs)
    yield Table(
        ["", "learning rate", "of", *(m.title for m in metrics)],
        [
            [
                config.label,
                f"{config.settings['learning_rate']:g}",
                ", ".join(f"{c.settings['learning_rate']:g}" for _, c in group),
                *(_cell(config.mean(m.name, config.total), m) for m in metrics),
            ]
            for config, group in zip(best, several, strict=True)
        ],
    )


def _price(configs: Sequence[Config]) -> Iterator[Block]:
    yield Heading("Price")
    yield Paragraph(
        "Seconds of the processor (of the wall where several threads work), means over runs. The "
        "peak of memory is that of the whole run: model, training and measuring."
    )

    def seconds(record: dict[str, Any], stage: str) -> float:
        known = "cpu_seconds" if record["machine"]["threads"] == 1 else "seconds"
        return record[known].get(stage, 0.0)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    rows = []
    for config in configs:
        runs = [r for r in config.runs.values() if not r["continued_after"]] or [
            *config.runs.values()
        ]
        training = mean([seconds(r, "training") for r in runs])
        measuring = mean([seconds(r, "measuring") for r in runs])
        peak = max(r["peak_bytes"] for r in runs)
        rows.append(
            [
                config.label,
                f"{mean([r['trained_parameters'] for r in runs]):,.0f}",
                f"{mean([seconds(r, 'initialization') for r in runs]):.2f}",
                f"{training:.1f}",
                f"{1000 * training / config.total:.0f}",
                f"{measuring:.1f}",
                f"{mean([seconds(r, 'images') for r in runs]):.1f}",
                decimal(peak),
            ]
        )
    yield Table(
        [
            "",
            "trained parameters",
            "initialisation, s",
            "training, s",
            "a step, ms",
            "loss and drift, s",
            "images, s",
            "peak memory",
        ],
        rows,
    )


def _plots(folder: Path, configs: Sequence[Config]) -> Iterator[Block]:
    require_writable_folder(folder / PLOTS_NAME)
    yield Heading("Plots")
    for number, (shared, members) in enumerate(groups_of(configs), 1):
        suffix = f": {shared}" if shared else ""
        courses = f"{PLOTS_NAME}/courses-{number}.png"
        if plot_courses(members, folder / courses):
            yield Picture(courses, f"Metrics against steps, with 95 % intervals{suffix}")
        trade_off = f"{PLOTS_NAME}/trade-off-{number}.png"
        if plot_trade_off(members, folder / trade_off):
            yield Picture(trade_off, f"Subject fidelity against prompt fidelity{suffix}")
        for pair in _first_pairs(members):
            name = f"{PLOTS_NAME}/images-{number}-{pair[0]}.jpg"
            if save_images_by_step(members, pair, folder / name):
                yield Picture(name, f"Images by step{suffix}; {pair[0]}, seed {pair[1]}")


def _first_pairs(configs: Sequence[Config]) -> list[Pair]:
    """The first seed of the first subjects."""
    first: dict[str, Pair] = {}
    for pair in sorted({pair for config in configs for pair in config.runs}):
        first.setdefault(pair[0], pair)
    return list(first.values())[:SUBJECTS_SHOWN]


def _measured(configs: Sequence[Config]) -> list[Metric]:
    return [m for m in METRICS if any(config.steps(m.name) for config in configs)]


def _cell(found: Estimate | None, metric: Metric, *, signed: bool = False) -> str:
    if found is None:
        return ""
    scaled = Estimate(
        metric.factor * found.mean,
        None if found.half_width is None else metric.factor * found.half_width,
        found.count,
    )
    star = "*" if signed and found.differs_from_zero else ""
    return _plus_minus(scaled, metric.digits, signed) + star


def _plus_minus(found: Estimate, digits: int, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{found.mean:{sign}.{digits}f}"
    return text if found.half_width is None else f"{text} ± {found.half_width:.{digits}f}"
