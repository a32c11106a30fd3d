"""GLUE: sentences and pairs of sentences to a class or a score (arXiv 1804.07461)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.tasks.data import (
    Mapped,
    Rows,
    TableFormat,
    column_of,
    read_tables,
    shuffled,
)
from cntlora_core.tasks.loading import load_model, load_part
from cntlora_core.tasks.presets import TEXT
from cntlora_core.tasks.recipes import TextSettings
from cntlora_core.tasks.run import TaskResult, run_task
from cntlora_core.tasks.scores import accuracy, matthews_correlation, pearson_correlation
from cntlora_core.tasks.settings import Plan, planned, preset_named
from cntlora_core.tasks.trainer import Task

BROKEN_ROWS = 0.01
"""QQP's own file has some rows that a line break cuts in two; more than this is another file."""


@dataclass(frozen=True)
class _Glue:
    """A task: names of its columns and classes, the first of each being the hub's."""

    folder: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    classes: tuple[str, ...]
    metric: str
    splits: tuple[str, ...] = ("validation",)
    column_names: tuple[str, ...] = ()


_NLI = ("entailment", "not_entailment")
_PAIR = (("sentence1",), ("sentence2",))
_MNLI_SPLITS = ("validation_matched", "validation_mismatched")
GLUE: Mapping[str, _Glue] = {
    "mnli": _Glue(
        "MNLI",
        (("premise", "sentence1"), ("hypothesis", "sentence2")),
        ("label", "gold_label"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        _MNLI_SPLITS,
    ),
    "qnli": _Glue("QNLI", (("question",), ("sentence",)), ("label",), _NLI, "accuracy"),
    "qqp": _Glue(
        "QQP", (("question1",), ("question2",)), ("label", "is_duplicate"), ("0", "1"), "accuracy"
    ),
    "sst2": _Glue("SST-2", (("sentence",),), ("label",), ("0", "1"), "accuracy"),
    "cola": _Glue(
        "CoLA",
        (("sentence",),),
        ("label",),
        ("0", "1"),
        "matthews_correlation",
        column_names=("source", "label", "mark", "sentence"),
    ),
    "mrpc": _Glue(
        "MRPC",
        (("sentence1", "#1 String"), ("sentence2", "#2 String")),
        ("label", "Quality", "\ufeffQuality"),
        ("0", "1"),
        "accuracy",
    ),
    "rte": _Glue("RTE", _PAIR, ("label",), _NLI, "accuracy"),
    "stsb": _Glue("STS-B", _PAIR, ("label", "score"), (), "pearson_correlation"),
}


def train_text(
    settings: TextSettings,
    reporter: Reporter = silent,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    data: Mapping[str, Rows] | None = None,
    **options: Any,
) -> TaskResult:
    """Fine-tune a text encoder on a task of GLUE.

    Args:
        settings: All settings.
        reporter: Told of all long work.
        model: Instead of the one that the settings name: with a head for the task's classes.
        tokenizer: Instead of the model's.
        data: Instead of the data that the settings name: by split (``train``, ``validation``; for
            MNLI ``validation_matched`` and ``validation_mismatched``) rows with the hub's columns.
        options: See :func:`.run_task`.

    Raises:
        ValueError: for data of another form, naming the split, the column or the row.
        FileNotFoundError: if model or data are not there.
    """
    plan = planned(settings, preset_named(TEXT, settings.preset, "text")[settings.task])
    task = text_task(plan, settings, model=model, tokenizer=tokenizer, data=data)
    return run_task(task, plan, reporter, **options)


def text_task(
    plan: Plan,
    settings: TextSettings,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    data: Mapping[str, Rows] | None = None,
) -> Task:
    """Model, data and metric; see :func:`train_text`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    glue, preset = GLUE[settings.task], plan.preset
    splits: dict[str, tuple[str, ...]] = {"train": ("train",)}
    for name in glue.splits:
        splits[name] = (name, name.replace("validation", "dev"))
    if data is None:
        layout = TableFormat((settings.task, glue.folder), splits, glue.column_names)
        data = read_tables(preset.data, layout, settings.task)
    missing = [name for name in splits if name not in data]
    if missing:
        raise ValueError(f"there is no split {missing[0]!r}; there are {', '.join(data)}")
    samples = {name: _samples(data[name], glue, f"split {name!r}") for name in splits}
    tokenizer = tokenizer or load_part(AutoTokenizer, preset.model, "a model with a tokenizer")
    base: Any = model
    new_layers: tuple[str, ...] = ()
    if base is None:
        classes = max(1, len(glue.classes))
        base, loading = load_model(
            AutoModelForSequenceClassification, plan, num_labels=classes, output_loading_info=True
        )
        new = {name.rpartition(".")[0] for name in loading["missing_keys"]}
        new_layers = tuple(sorted(name for name in new if name.split(".")[0] not in preset.head))
    measured: dict[str, Any] = {name: samples[name] for name in glue.splits}
    if preset.options.get("halve_validation"):
        measured = halved(measured, settings.seed)
    length = settings.max_tokens or preset.options["max_tokens"]
    return Task(
        name=f"GLUE {glue.folder}",
        model=base,
        train=samples["train"],
        splits=measured,
        collate=_Collate(tokenizer, length, not glue.classes),
        measure=measure_classes,
        score=_Score(glue.metric),
        best=glue.metric,
        new_layers=new_layers,
        loss=loss_of_classes,
    )


def halved(splits: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The first split in two, ``validation`` and ``test``; further splits stay.

    The validation set gets 1000 samples where there are more than 2000, else half of them.
    """
    (_, first), *rest = splits.items()
    order = shuffled(len(first), seed)
    count = 1000 if len(order) > 2000 else -(-len(order) // 2)
    return {
        "validation": Subset(first, order[:count]),
        "test": Subset(first, order[count:]),
        **dict(rest),
    }


def measure_classes(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
    """Rows of logits and, last, the label."""
    found = model(**batch)
    return found.loss, torch.cat([found.logits.float(), batch["labels"][:, None].float()], dim=1)


def loss_of_classes(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss, which is a mean over the batch whatever the Trainer tells it.

    The Trainer takes a model that accepts further arguments for one that divides by the number of
    labels in all processes and accumulated batches, and would undo that here.
    """
    return model(**batch).loss


def score_classes(rows: np.ndarray) -> dict[str, float]:
    """Accuracy from the rows of :func:`measure_classes`."""
    return {"accuracy": accuracy(rows[:, :-1].argmax(1), rows[:, -1])}


@dataclass(frozen=True)
class _Score:
    metric: str

    def __call__(self, rows: np.ndarray) -> dict[str, float]:
        labels = rows[:, -1]
        if self.metric == "pearson_correlation":
            return {self.metric: pearson_correlation(rows[:, 0], labels)}
        predicted = rows[:, :-1].argmax(1)
        found = {"accuracy": accuracy(predicted, labels)}
        if self.metric == "matthews_correlation":
            found[self.metric] = matthews_correlation(predicted, labels)
        return found


@dataclass(frozen=True)
class _Collate:
    tokenizer: Any
    max_tokens: int
    is_score: bool

    def __call__(self, samples: list[tuple[tuple[str, ...], float]]) -> Mapping[str, Tensor]:
        texts = list(zip(*(texts for texts, _ in samples), strict=True))
        batch = self.tokenizer(
            *(list(column) for column in texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        kind = torch.float32 if self.is_score else torch.long
        return {**batch, "labels": torch.tensor([label for _, label in samples], dtype=kind)}


def _samples(rows: Rows, glue: _Glue, where: str) -> Sequence[Any]:
    texts = [column_of(rows, names, where) for names in glue.texts]
    label = column_of(rows, glue.label, where)
    values = _column(rows, label)
    whole = [i for i, value in enumerate(values) if value not in (None, "")]
    if (broken := len(values) - len(whole)) > BROKEN_ROWS * len(values):
        whole = list(range(len(values)))  # the first of them is named below
    elif broken:
        warnings.warn(f"{where}: {broken} rows without a label are left out", stacklevel=2)
    labels = {i: _label(values[i], glue, f"{where}, row {i}, column {label!r}") for i in whole}
    return Mapped(whole, _Row(rows, tuple(texts), labels, where))  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Row:
    """A sample by its number; no closure, so that processes that prepare samples can have it."""

    rows: Rows
    texts: tuple[str, ...]
    labels: Mapping[int, float]
    where: str

    def __call__(self, index: int) -> tuple[tuple[str, ...], float]:
        row = self.rows[index]
        for name in self.texts:
            if row[name] is None:
                raise ValueError(f"{self.where}, row {index}: column {name!r} is empty")
        return tuple(str(row[name]) for name in self.texts), self.labels[index]


def _column(rows: Any, name: str) -> Sequence[Any]:
    return rows[name] if hasattr(rows, "column_names") else [row[name] for row in rows]


def _label(value: Any, glue: _Glue, where: str) -> float:
    if glue.classes and str(value) in glue.classes:
        return glue.classes.index(str(value))
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not glue.classes and 0 <= number <= 5:
        return number
    if glue.classes and number in range(len(glue.classes)):
        return int(number)
    expected = f"one of {', '.join(glue.classes)}" if glue.classes else "a score from 0 to 5"
    hint = " (GLUE's test sets have none: measure on the validation set)" if number == -1 else ""
    raise ValueError(f"{where}: the label {value!r} is not {expected}{hint}")
