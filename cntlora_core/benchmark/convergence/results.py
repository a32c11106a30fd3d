"""The runs in a folder, by what they have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cntlora_core.benchmark.convergence.controls import CONTROLS
from cntlora_core.benchmark.convergence.statistics import Estimate, estimate
from cntlora_core.config import CNTLoRAConfig

Pair = tuple[str, int]
"""Subject and seed: what runs of different settings are paired by."""


@dataclass(frozen=True)
class Metric:
    """Something that is measured.

    Attributes:
        name: Its key in a run's rows.
        title: For people.
        higher_is_better: Whether training is to raise it.
        factor: What it is multiplied by in tables.
        digits: Decimals in tables.
    """

    name: str
    title: str
    higher_is_better: bool
    factor: float = 1.0
    digits: int = 3


METRICS = (
    Metric("dino", "DINO", True),
    Metric("clip_i", "CLIP-I", True),
    Metric("clip_t", "CLIP-T", True),
    Metric("backgrounds", "right backgrounds, %", True, 100, 1),
    Metric("loss", "held-out loss x 1e4", False, 1e4, 1),
    Metric("drift", "drift x 1e4", False, 1e4, 1),
)
METRIC = {metric.name: metric for metric in METRICS}

_OF_METHOD = ("method", "control_of", *CNTLoRAConfig.__dataclass_fields__)


@dataclass
class Config:
    """All runs that differ in subject and seed alone.

    Attributes:
        settings: What they share, flat.
        runs: Their records, by subject and seed.
        label: What tells it from the other settings, in a few words.
    """

    settings: dict[str, Any]
    runs: dict[Pair, dict[str, Any]] = field(default_factory=dict)
    label: str = ""

    @property
    def method(self) -> str:
        return self.settings["method"]

    @property
    def total(self) -> int:
        """Training steps."""
        return self.settings["steps"]

    def shared(self, *without: str) -> str:
        """The settings that other methods can have alike, as text to compare."""
        kept = {k: v for k, v in self.settings.items() if k not in (*_OF_METHOD, *without)}
        return json.dumps(kept, sort_keys=True)

    def at(self, metric: str, step: int) -> dict[Pair, float]:
        """A metric after a step, by subject and seed, where it was measured."""
        courses = {pair: dict(self.course(metric, pair)) for pair in self.runs}
        return {pair: course[step] for pair, course in courses.items() if step in course}

    def mean(self, metric: str, step: int) -> Estimate | None:
        """A metric after a step, over subjects."""
        return estimate(by_subject(self.at(metric, step)))

    def difference(self, other: Config, metric: str, step: int) -> Estimate | None:
        """How much more of a metric than other runs, paired by subject and seed, over subjects."""
        own, theirs = self.at(metric, step), other.at(metric, step)
        return estimate(by_subject({p: own[p] - theirs[p] for p in own if p in theirs}))

    def course(self, metric: str, pair: Pair) -> list[tuple[int, float]]:
        """(step, value) of one run, where it was measured."""
        rows = self.runs[pair]["rows"]
        return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]

    def steps(self, metric: str) -> list[int]:
        """The steps after which a metric was measured in any run."""
        return sorted({step for pair in self.runs for step, _ in self.course(metric, pair)})


def by_subject(values: Mapping[Pair, float]) -> list[float]:
    """One value for each subject, the mean of its seeds: these are not independent of each other.
    Of a single subject, one for each seed."""
    subjects: dict[str, list[float]] = {}
    for (subject, _), value in values.items():
        subjects.setdefault(subject, []).append(value)
    if len(subjects) == 1:
        return list(values.values())
    return [sum(found) / len(found) for found in subjects.values()]


def load_records(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of all finished runs, and those of failed ones, in a stable order.

    Raises:
        ValueError: if there is no finished run.
    """
    done, failed = [], []
    for place in sorted((folder / "runs").glob("*")):
        for name, found in (("run.json", done), ("failed.json", failed)):
            path = place / name
            if path.is_file():
                found.append(json.loads(path.read_text("utf-8")) | {"folder": str(place)})
                break
    if not done:
        raise ValueError(
            f"{folder} holds no finished run: `cntlora bench convergence GRID.toml --output "
            f"{folder}` makes some"
        )
    return done, failed


def configs_of(records: Sequence[dict[str, Any]]) -> list[Config]:
    """Runs by settings, labelled, in the order of method and learning rate."""
    configs: dict[str, Config] = {}
    for record in records:
        settings = dict(record["settings"])
        pair = (settings.pop("subject"), settings.pop("seed"))
        measured = json.dumps([record["model"]["fingerprint"], record["measure"]], sort_keys=True)
        settings["measured"] = hashlib.sha256(measured.encode()).hexdigest()[:6]
        key = json.dumps(settings, sort_keys=True)
        configs.setdefault(key, Config(settings)).runs[pair] = record
    found = sorted(configs.values(), key=_order)
    varied = _varied(found)
    for config in found:
        config.label = ", ".join([config.method, *_named(config, varied)])
    return found


def baseline_of(config: Config, name: str, configs: Sequence[Config]) -> Config | None:
    """What a configuration is compared with.

    Args:
        config: The configuration.
        name: A method: that at equal settings; where there is none, the one that differs in
            learning rate alone, if it has one only. ``method@rate``: at this learning rate.
        configs: All there are.

    Returns:
        None where nothing fits, and for the baseline itself.
    """
    method, _, rate = name.partition("@")
    if config.method == method and not rate:
        return None
    for without in [("learning_rate",)] if rate else [(), ("learning_rate",)]:
        same = [
            other
            for other in configs
            if other.method == method
            and other.shared(*without) == config.shared(*without)
            and (not rate or other.settings["learning_rate"] == float(rate))
        ]
        if len(same) == 1:
            return same[0] if same[0] is not config else None
    return None


def groups_of(configs: Sequence[Config], most: int = 14) -> list[tuple[str, list[Config]]]:
    """What fits into one figure each: everything, or the settings that can be told apart by method.

    Returns:
        What each group shares, in words, and its members.
    """
    if len(configs) <= most:
        return [("", list(configs))]
    varied = [name for name in _varied(configs) if name not in _OF_METHOD]
    groups: dict[str, list[Config]] = {}
    for config in configs:
        groups.setdefault(", ".join(_named(config, varied)), []).append(config)
    return list(groups.items())


def _order(config: Config) -> tuple[Any, ...]:
    first = {"lora": 0, "eva": 1}.get(config.method, 3 if config.method in CONTROLS else 2)
    return first, config.method, config.settings["learning_rate"], json.dumps(config.settings)


def _varied(configs: Sequence[Config]) -> list[str]:
    names = dict.fromkeys(name for config in configs for name in config.settings)
    return [
        name
        for name in names
        if name != "method"
        and len({json.dumps(c.settings[name]) for c in configs if name in c.settings}) > 1
        and not (name == "alpha" and len({c.settings["rank"] for c in configs}) > 1)
    ]


def _named(config: Config, names: Sequence[str]) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {_short(config.settings[name])}"
        for name in names
        if name in config.settings
    ]


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
