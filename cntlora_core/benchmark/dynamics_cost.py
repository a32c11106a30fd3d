"""The share of a training step's time that recording its dynamics takes.

    python -m cntlora_core.benchmark.dynamics_cost --output dynamics_cost.json

Every step is recorded, and within it the CPU time of the recorder's own functions and hooks is
taken: both are of the same run, so that what else the machine does concerns them alike. The models
have random weights: Stable Diffusion 1.5 in the image trainer, and a text encoder of RoBERTa's base
size in transformers' Trainer.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from peft import LoraConfig, get_peft_model

from cntlora_core.benchmark.training_memory import Benchmark as StepSettings
from cntlora_core.benchmark.training_memory import one_batch, trainer_of
from cntlora_core.dynamics.callback import DynamicsCallback
from cntlora_core.dynamics.recorder import DynamicsRecorder
from cntlora_core.dynamics.token_moments import TokenMoments
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.memory import freed_memory_kept

WARM_UP = 2  # steps that are not counted


@dataclass(frozen=True)
class DynamicsCost:
    """What is measured.

    Attributes:
        output: JSON file for the result.
        steps: Recorded steps of each case, beside two that are not counted.
        every: Steps between measurements of the second moments.
        resolution: Of Stable Diffusion 1.5, in pixels.
        cases: sd15, roberta or both.
    """

    output: Path = Path("dynamics_cost.json")
    steps: int = 10
    every: int = 10
    resolution: int = 256
    cases: tuple[str, ...] = ("roberta", "sd15")


class Stopwatch:
    """The CPU time of the recorder's functions and hooks since it was last set to 0."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        for kind, names in (
            (DynamicsRecorder, ("begin_step", "gradients", "end_step")),
            (DynamicsCallback, ("_see_gradient", "_see_output")),
            (TokenMoments, ("_see_tokens", "_see_input")),
        ):
            for name in names:
                setattr(kind, name, self._timed(getattr(kind, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.process_time() - began

        return timed


def sd15(b: DynamicsCost, folder: Path, begin: Callable[[int], None]) -> None:
    """Steps of the image trainer, one photo and one class image each, at rank 128."""
    settings = StepSettings()
    trainer: Any = trainer_of(settings, "float32", checkpointing=False)
    for network in trainer.networks.values():
        for weight in network.train().parameters():
            if not weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.01)
    batch = one_batch(settings, b.resolution)
    trainer._batch = lambda _micro: batch
    with (
        freed_memory_kept(),
        DynamicsRecorder(trainer.networks, folder / "sd15.jsonl", every=b.every) as recorder,
    ):
        trainer._recorder = recorder
        for step in range(WARM_UP + b.steps):
            begin(step)
            recorder.end_step(trainer._one_step())


def roberta(b: DynamicsCost, folder: Path, begin: Callable[[int], None]) -> None:
    """Steps of transformers' Trainer, 8 texts of 128 tokens each, at rank 16 on q, k and v."""
    from transformers import (
        RobertaConfig,
        RobertaForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Begin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            begin(state.global_step)

    config = LoraConfig(r=16, lora_alpha=32, target_modules=["query", "key", "value"])
    model = get_peft_model(RobertaForSequenceClassification(RobertaConfig()), config)
    rows = [{"input_ids": torch.randint(5, 1000, (128,)), "labels": i % 2} for i in range(64)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=WARM_UP + b.steps,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks = [Begin(), DynamicsCallback(every=b.every, plot=False)]
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()  # pyright: ignore[reportArgumentType]


def run(b: DynamicsCost) -> dict[str, Any]:
    """The share by case; the result is also written to ``b.output``."""
    torch.manual_seed(0)
    watch, result = Stopwatch(), dict[str, Any](torch=torch.__version__, every=b.every, cases={})
    for name in b.cases:
        began = 0.0

        def begin(step: int) -> None:
            nonlocal began
            if step == WARM_UP:
                watch.seconds, began = 0.0, time.process_time()

        with tempfile.TemporaryDirectory() as folder:
            {"sd15": sd15, "roberta": roberta}[name](b, Path(folder), begin)
        seconds = time.process_time() - began
        found = {
            "steps": b.steps,
            "cpu_seconds_per_step": seconds / b.steps,
            "share": watch.seconds / seconds,
        }
        result["cases"][name] = found
        print(name, f"{seconds / b.steps:.2f} s of CPU a step, {found['share']:.2%} of them")
        write_json_atomic(b.output, result)
    return result


if __name__ == "__main__":
    run(tyro.cli(DynamicsCost))
