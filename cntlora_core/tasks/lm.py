"""The eight commonsense sets, in the layout of LLM-Adapters (arXiv 2304.01933)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import user_path
from cntlora_core.tasks.answers import (
    collate_answers,
    encode_answer,
    generate_answers,
    use_padding,
)
from cntlora_core.tasks.data import Mapped, Rows, read_records, require_columns, shuffled
from cntlora_core.tasks.loading import load_model, load_part
from cntlora_core.tasks.presets import LM
from cntlora_core.tasks.recipes import COMMONSENSE, LmSettings
from cntlora_core.tasks.run import TaskResult, run_task
from cntlora_core.tasks.settings import Plan, planned, preset_named
from cntlora_core.tasks.trainer import Task

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ANSWERS = tuple(
    re.compile(kind)
    for kind in ("true|false", "solution[12]", "answer[1-5]", "ending[1-4]", "option[12]")
)
"""What can be chosen; each set has one of these kinds."""

_TOGETHER = ("commonsense_170k.json", "commonsense_15k.json")


def train_lm(
    settings: LmSettings,
    reporter: Reporter = silent,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    data: Mapping[str, Rows] | None = None,
    **options: Any,
) -> TaskResult:
    """Fine-tune a causal language model on the commonsense sets.

    Args:
        settings: All settings.
        reporter: Told of all long work.
        model: Instead of the one that the settings name.
        tokenizer: Instead of the model's.
        data: Instead of the data that the settings name: by split (``train`` and others to measure
            on) rows with ``instruction`` and ``output``, and ``input`` if there is one.
        options: See :func:`.run_task`.

    Raises:
        ValueError: for data of another form, naming the split, the column or the row.
        FileNotFoundError: if model or data are not there.
    """
    plan = planned(settings, preset_named(LM, settings.preset, "lm"))
    task = lm_task(plan, settings, model=model, tokenizer=tokenizer, data=data)
    return run_task(task, plan, reporter, **options)


def lm_task(
    plan: Plan,
    settings: LmSettings,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    data: Mapping[str, Rows] | None = None,
) -> Task:
    """Model, data and metric; see :func:`train_lm`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    preset = plan.preset
    if data is None:
        data = read_commonsense(preset.data, settings.sets)
    for split, rows in data.items():
        require_columns(rows, ("instruction", "output"), f"split {split!r}")
        for i, row in enumerate(rows):
            try:
                choice_in(str(row["output"]))
            except ValueError as error:
                raise ValueError(f"split {split!r}, row {i}: {error}") from None
    words: Any = tokenizer or load_part(AutoTokenizer, preset.model, "a model with a tokenizer")
    use_padding(words)
    base: Any = model if model is not None else load_model(AutoModelForCausalLM, plan)
    encode = _Encode(words, settings.max_tokens or preset.options["max_tokens"])
    measured = {name: Mapped(rows, encode) for name, rows in data.items() if name != "train"}
    train: Any = data["train"]
    if settings.held_out >= len(train):
        raise ValueError(
            f"held_out={settings.held_out} leaves nothing of {len(train)} samples to train on"
        )
    splits: dict[str, Any] = {}
    if settings.held_out:
        order = shuffled(len(train), settings.seed)
        splits["validation"] = Mapped(Subset(train, order[: settings.held_out]), encode)  # pyright: ignore[reportArgumentType]
        train = Subset(train, order[settings.held_out :])
    generated: list[dict[str, Any]] = []
    return Task(
        name="commonsense",
        model=base,
        train=Mapped(train, encode),
        splits={**splits, **measured},
        collate=_Collate(words.pad_token_id),
        measure=_Measure(
            words,
            generated,
            settings.max_new_tokens or preset.options["max_new_tokens"],
            settings.beams or preset.options["beams"],
        ),
        score=score_answers,
        best="accuracy",
        averaged=tuple(measured),
        generated=generated,
    )


def read_commonsense(source: str, sets: Sequence[str] = COMMONSENSE) -> dict[str, Rows]:
    """Training samples and those of each set, from a folder in LLM-Adapters' layout.

    Args:
        source: The folder, with ``<set>/test.json`` for each set, perhaps within ``dataset``, and
            either ``commonsense_170k.json``, perhaps within ``ft-training_set``, or
            ``<set>/train.json`` for each set.
        sets: Names of the sets.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: if a file holds something else.
    """
    if not source:
        raise ValueError("give data: the folder of the commonsense sets in LLM-Adapters' layout")
    root = user_path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    inner = root / "dataset" if (root / "dataset").is_dir() else root
    found: dict[str, Rows] = {}
    together = [
        path
        for folder in (root / "ft-training_set", root)
        for name in _TOGETHER
        if (path := folder / name).is_file()
    ]
    if together:
        found["train"] = read_records(together[0])
    else:
        found["train"] = [r for s in sets for r in read_records(inner / s / "train.json")]
    for name in sets:
        found[name] = read_records(inner / name / "test.json")
    return found


def score_answers(rows: np.ndarray) -> dict[str, float]:
    """Accuracy, and the share of answers that are none of those that could be chosen."""
    return {"accuracy": float(rows[:, 0].mean()), "unreadable": float(rows[:, 1].mean())}


def choice_in(output: str) -> tuple[str, re.Pattern[str]]:
    """The answer that a row's output names, and the kind of answers it is one of.

    Raises:
        ValueError: if there is none.
    """
    for kind in ANSWERS:
        if found := kind.search(output.lower()):
            return found[0], kind
    raise ValueError(
        f"the output {output[:60]!r} names no answer; the sets' answers are true, false, "
        "solutionN, answerN, endingN and optionN"
    )


@dataclass(frozen=True)
class _Encode:
    tokenizer: Any
    max_tokens: int

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        prompt = PROMPT_WITH_INPUT if row.get("input") else PROMPT
        text = prompt.format(instruction=row["instruction"], input=row.get("input", ""))
        return encode_answer(self.tokenizer, text, str(row["output"]), self.max_tokens)


@dataclass(frozen=True)
class _Collate:
    padding: int

    def __call__(self, samples: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return collate_answers(samples, self.padding)


@dataclass(frozen=True)
class _Measure:
    tokenizer: Any
    generated: list[dict[str, Any]]
    max_new_tokens: int
    beams: int

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        loss = model(**batch).loss
        prompts, expected, written = generate_answers(
            model, batch, self.tokenizer, max_new_tokens=self.max_new_tokens, num_beams=self.beams
        )
        rows = []
        for prompt, right, answer in zip(prompts, expected, written, strict=True):
            wanted, kind = choice_in(right)
            found = kind.search(answer.lower())
            rows.append([float(found is not None and found[0] == wanted), float(found is None)])
            self.generated.append({"prompt": prompt, "expected": right, "generated": answer})
        return loss, torch.tensor(rows, device=batch["input_ids"].device)
