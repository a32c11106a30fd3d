"""transformers' Trainer for the recipes: its parameter groups, its measurements, its callbacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from cntlora_core.runtime.console import Cancelled
from cntlora_core.runtime.progress import Reporter
from cntlora_core.tasks.adapting import ForwardFn, MaskFn

Rows = np.ndarray
LossFn = Callable[[nn.Module, Mapping[str, Any]], Tensor]
MeasureFn = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor | None, Tensor]]
ScoreFn = Callable[[Rows], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A model, its data, and what is measured.

    Attributes:
        name: For titles.
        model: The base model, not wrapped.
        train: Samples to train on: a sequence, or a map-style dataset.
        splits: Samples to measure on, by the name of the split; the first one chooses the best
            checkpoint.
        collate: Makes a batch, a mapping of tensors, of a list of samples.
        measure: ``measure(model, batch)`` gives the mean loss, or None, and one row of numbers for
            each sample of the batch, float32 (n, k). It is called in evaluation mode, without
            gradients; what it is given is not wrapped for several processes.
        score: From the rows of a split, (samples, k), to its metrics by name.
        best: The metric that chooses the best checkpoint.
        lower_is_better: Whether a smaller value of it is better.
        loss: ``loss(model, batch)`` gives the mean loss; default: the output's ``loss``.
        forward_fn: How the initialisation runs the model; default: ``model(**batch)``.
        mask_fn: Which tokens count in the initialisation; default: the model's own masks.
        averaged: The splits whose mean of `best` is reported too.
        new_layers: Modules that the pre-trained weights lack: they are trained, and saved with the
            adapter.
        generated: What a run has written in words, for a person to look at; `measure` appends.
    """

    name: str
    model: nn.Module
    train: Sequence[Any] | Dataset[Any]
    splits: Mapping[str, Sequence[Any] | Dataset[Any]]
    collate: Callable[[list[Any]], Mapping[str, Any]]
    measure: MeasureFn
    score: ScoreFn
    best: str
    lower_is_better: bool = False
    loss: LossFn | None = None
    forward_fn: ForwardFn | None = None
    mask_fn: MaskFn | None = None
    averaged: tuple[str, ...] = ()
    new_layers: tuple[str, ...] = ()
    generated: list[dict[str, Any]] = field(default_factory=list)


class TaskTrainer(Trainer):
    """Trains and measures a :class:`Task`.

    Args:
        task: What is trained.
        layer_decay: Factor of the learning rate from one layer to the one below.
        decay_to_zero: Whether matrices of adapters decay like others; their initialisation is kept
            otherwise, by :class:`DecayToInitialisation`.
        lora_plus: Learning rate of up matrices over that of down matrices.
        head_rates: Learning rates of modules by name, in place of all that.
        options: The Trainer's own.

    Attributes:
        measured: The steps done at the last measurement, and what it found; -1 before the first.
    """

    def __init__(
        self,
        task: Task,
        *,
        layer_decay: float = 1.0,
        decay_to_zero: bool = True,
        lora_plus: float = 1.0,
        head_rates: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        self.task, self.layer_decay, self.decay_to_zero = task, layer_decay, decay_to_zero
        self.lora_plus, self.head_rates = lora_plus, head_rates
        self.measured: tuple[int, dict[str, float]] = (-1, {})
        super().__init__(
            compute_metrics=lambda found: task.score(_rows(found)),
            data_collator=task.collate,  # pyright: ignore[reportArgumentType]
            **options,
        )
        if task.loss is not None:
            self.model_accepts_loss_kwargs = False  # a mean of its own: the Trainer divides it

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        """The task's own loss where it has one."""
        if self.task.loss is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **options)
        loss = self.task.loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, *_args: Any, **_options: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One row of numbers for each sample, twice: a Trainer that scores asks for labels too."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, rows = self.task.measure(self.accelerator.unwrap_model(model), inputs)
        rows = rows.detach().float().contiguous()
        return (None if loss is None else loss.detach().float().reshape(1)), rows, rows

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """As the Trainer does; `Task.generated` holds what this measurement generates."""
        self.task.generated.clear()
        try:
            found = super().evaluate(*args, **options)
        except Cancelled:
            if self.is_in_train and self.args.world_size == 1:  # a step is saved after measuring
                self._save_checkpoint(cast(nn.Module, self.model), None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            raise
        self.measured = self.state.global_step, found
        return found

    def take_finished(self, checkpoint: Path) -> bool:
        """Take model and curves of a training that lacks no step: `train` would add one.

        Returns:
            Whether it is one.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < self.args.max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end:
            self._load_best_model()
        return True

    def create_optimizer(self, *_args: Any, **_options: Any) -> torch.optim.Optimizer:
        """Biases and norms do not decay; in full fine-tuning lower layers learn more slowly."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # pyright: ignore[reportArgumentType]
            groups = parameter_groups(
                self.model,  # pyright: ignore[reportArgumentType]
                self.args.learning_rate,
                self.args.weight_decay,
                self.layer_decay,
                decay_adapters=self.decay_to_zero,
                lora_plus=self.lora_plus,
                head_rates=self.head_rates,
            )
            self.optimizer = kind(groups, **options)
        return self.optimizer


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    *,
    decay_adapters: bool = True,
    lora_plus: float = 1.0,
    head_rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters, grouped by learning rate and weight decay.

    Args:
        model: With ``requires_grad`` where it is trained.
        learning_rate: Of the head, which is above the last layer.
        weight_decay: Of all that has two dimensions or more.
        layer_decay: Each layer's learning rate is that of the next one times this; embeddings are
            below the first layer, and what is in no layer is the head.
        decay_adapters: Whether adapters' matrices have the weight decay.
        lora_plus: Learning rate of up matrices over that of down matrices (arXiv 2402.12354).
        head_rates: Learning rates of modules by name, in place of all that.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapters = {
        id(p)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name, p in module.named_parameters()
        if "base_layer" not in name
    }
    depths = {name: _depth(name) for name, _ in trained}
    top = max((d for d in depths.values() if d is not None), default=0) + 1
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        depth = depths[name]
        rate = learning_rate * layer_decay ** (top - (top if depth is None else depth))
        if ".lora_B." in name:
            rate *= lora_plus
        for head, own in (head_rates or {}).items():
            rate = own if f".{head}." in f".{name}" else rate
        decays = parameter.ndim > 1 and (decay_adapters or id(parameter) not in adapters)
        groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": p, "lr": r, "weight_decay": w} for (r, w), p in groups.items()]


def _depth(name: str) -> int | None:
    """0 for embeddings, 1 for the first layer; None for what is in no layer."""
    layer = re.search(r"(?:^|\.)(?:layers?|blocks?|h|resblocks)\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1
    embedding = re.search(r"embed|cls_token|patch|position|wte|wpe", name)
    return 0 if embedding else None


class DecayToInitialisation(TrainerCallback):
    """Weight decay of adapters whose base was rewritten: towards their initialisation, not 0.

    Args:
        initial: Initial values of the parameters.
        weight_decay: As AdamW's.
    """

    def __init__(self, initial: Mapping[nn.Parameter, Tensor], weight_decay: float) -> None:
        self.initial, self.weight_decay = initial, weight_decay

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        with torch.no_grad():
            for group in optimizer.param_groups:
                share = group["lr"] * self.weight_decay
                for parameter in group["params"]:
                    if parameter in self.initial:
                        parameter.lerp_(self.initial[parameter].to(parameter), share)


class AfterStep(TrainerCallback):
    """Calls a method's own work after the optimizer's step, before gradients are cleared."""

    def __init__(self, after_step: Callable[[int], None]) -> None:
        self.after_step = after_step

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.after_step(state.global_step + 1)


class Progress(TrainerCallback):
    """Tells a reporter of steps and measurements; stops after a step when the reporter says so.

    A run in one process is stopped with a checkpoint, so that nothing is lost.
    """

    def __init__(self, reporter: Reporter, stage: str) -> None:
        self.reporter, self.stage = reporter, stage
        self.cancelled: Cancelled | None = None
        self._measured = self._before = 0
        self._loss: dict[str, Any] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._loss = {"loss": logs["loss"]}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        try:
            self.reporter(self.stage, state.global_step, state.max_steps, self._loss)
        except Cancelled as cancelled:
            if args.world_size > 1:
                raise
            self.cancelled = cancelled
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        self._measured += 1
        total = self._before + len(eval_dataloader)  # all measurements are one stage
        self.reporter("measuring", self._measured, total, {})
        if self._measured == total:
            self._before = total


def _rows(found: EvalPrediction) -> Rows:
    rows = found.predictions
    return np.asarray(rows[0] if isinstance(rows, tuple) else rows)
