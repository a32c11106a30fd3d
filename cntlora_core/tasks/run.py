"""One run of any recipe: adapt, train, measure, write."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import AdaLoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from cntlora_core import __version__
from cntlora_core.lava import with_orthogonality
from cntlora_core.methods import get_method
from cntlora_core.methods.comparisons import AdaLoraOrthogonality
from cntlora_core.runtime.files import (
    finite_or_null,
    remove,
    require_writable_folder,
    write_json_atomic,
)
from cntlora_core.runtime.processes import Processes
from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import read_json_object
from cntlora_core.runtime.seeds import torch_seed
from cntlora_core.saving.trainer_callback import ConvertedCheckpoints
from cntlora_core.tasks.adapting import (
    Adapted,
    Reading,
    adapt,
    adapt_again,
    initial_factors,
    initialization_batches,
    require_autocast,
    save_adapter,
    train_in_float32,
    write_report,
)
from cntlora_core.tasks.curves import TIMES, Curves, plot_curves
from cntlora_core.tasks.data import at_most
from cntlora_core.tasks.settings import Plan, check_same_run, fresh_folder
from cntlora_core.tasks.trainer import (
    AfterStep,
    DecayToInitialisation,
    Progress,
    Task,
    TaskTrainer,
)

CHECKPOINTS, BEGUN = "checkpoints", "run.json"
_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_RESULTS = ("adapter", "model", "base", "metrics.json", "curves.json", "curves.png", "ranks.json")


@dataclass(frozen=True)
class TaskResult:
    """What a run left behind.

    Attributes:
        folder: The output folder.
        adapter: The folder of the adapter; of the model after full fine-tuning.
        metrics: By split, its metrics by name, ``loss`` among them.
        curves: Training loss and validation metrics against steps.
        trained_parameters: How many numbers were trained.
        seconds: Time of the initialisation and of the training.
        model: The trained model; an adapter is still separate.
    """

    folder: Path
    adapter: Path
    metrics: dict[str, dict[str, float]]
    curves: Curves
    trained_parameters: int
    seconds: dict[str, float]
    model: nn.Module


def run_task(
    task: Task,
    plan: Plan,
    reporter: Reporter = silent,
    *,
    config: PeftConfig | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> TaskResult:
    """Adapt a task's model, train it, measure it, and write what came out.

    The output folder gets ``run.json``, the settings, when the training begins, ``ranks.json``
    where the method has ranks, and ``checkpoints/``, from which ``resume`` goes on; at the end
    ``adapter/``, which fits the stock base (``model/`` after full fine-tuning), ``metrics.json``,
    ``curves.json`` and ``curves.png``.

    Args:
        task: Model, data and metric. Its model is wrapped in place.
        plan: All settings.
        reporter: Told of all long work.
        config: An adapter of peft's own in place of the registry's methods.
        callbacks: Further callbacks of the Trainer.

    Raises:
        ValueError: if the output folder holds another run, for settings that do not go together,
            or if a run is to be resumed with other settings than it was begun with.
        Cancelled: if the reporter stops the run; ``resume`` goes on with it.
    """
    settings = plan.settings
    if new := [name for name in task.new_layers if name not in plan.preset.head]:
        head = (*plan.preset.head, *new)
        plan = dataclasses.replace(plan, preset=dataclasses.replace(plan.preset, head=head))
    preset = plan.preset
    if settings.head_learning_rate and not preset.head:
        raise ValueError(
            "head_learning_rate is that of modules that are trained in full, and there are none: "
            "leave it out"
        )
    require_autocast(task.model, preset)
    _world(settings.device)  # joins the processes of a launcher
    processes = Processes()
    folder = fresh_folder(settings)
    if len(task.train) == 0:  # pyright: ignore[reportArgumentType]
        raise ValueError("there is no sample to train on")
    train = at_most(task.train, settings.max_train, settings.seed)
    splits = {
        name: at_most(split, settings.max_eval, settings.seed)
        for name, split in task.splits.items()
    }
    args = training_arguments(plan, len(train), folder, task, bool(splits))
    checkpoints = folder / CHECKPOINTS
    checkpoint = None
    if settings.resume:
        checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        if checkpoint is None:
            raise ValueError(f"there is no checkpoint in {checkpoints} to go on from")
        check_same_run(_begun(folder), plan)
    processes.run(
        lambda: _prepare(folder, settings.overwrite) if processes.first else None,
        "preparing the output folder",
    )
    set_seed(torch_seed(settings.seed) % 2**32)
    start = time.perf_counter()
    task.model.to(args.device)  # pyright: ignore[reportArgumentType]
    if checkpoint is None:
        share = _share(plan, args)
        batches = initialization_batches(
            train,
            task.collate,
            batch_size=args.per_device_train_batch_size,
            count=settings.init_batches * (preset.batch_size // args.per_device_train_batch_size),
            seed=settings.seed,
            share=share,
            device=args.device,
        )
        reading = Reading(batches, task.forward_fn, task.mask_fn, task.loss)
        adapted = adapt(
            task.model, plan, reading, steps=args.max_steps, reporter=reporter, config=config
        )
        if processes.first:
            _begin(folder, task, plan, adapted)
    else:
        adapted = adapt_again(task.model, plan, Path(checkpoint))
    train_in_float32(adapted.model)
    adapted.model.to(args.device)  # pyright: ignore[reportArgumentType]
    initialised = time.perf_counter() - start
    name = preset.method if config is None else str(config.peft_type).rpartition(".")[2].lower()
    progress = Progress(reporter, f"training by {name}")
    trainer = _trainer(task, plan, adapted, args, train, splits, (progress, *callbacks))
    start = time.perf_counter()
    if checkpoint is None or not trainer.take_finished(Path(checkpoint)):
        trainer.train(resume_from_checkpoint=checkpoint)
    if progress.cancelled is not None:
        raise progress.cancelled
    seconds = {"initialisation": initialised, "training": time.perf_counter() - start}
    metrics = {name: _measured(trainer, name, split) for name, split in splits.items()}
    if task.averaged:
        values = [metrics[name][task.best] for name in task.averaged]
        metrics["average"] = {task.best: sum(values) / len(values)}
    model = adapted.model
    curves = Curves.of(trainer.state.log_history, task.best)
    result = TaskResult(
        folder,
        folder / ("adapter" if isinstance(model, PeftModel) else "model"),
        metrics,
        curves,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds,
        model,
    )
    if processes.first:
        _write(result, task, plan, adapted, name)
    trainer.accelerator.wait_for_everyone()
    return result


def training_arguments(
    plan: Plan, samples: int, folder: Path, task: Task, measures: bool = True
) -> TrainingArguments:
    """The Trainer's settings.

    Args:
        plan: The run's settings.
        samples: How many there are to train on.
        folder: Of the run.
        task: Says which metric is the best one.
        measures: Whether there is a split to measure on while training.

    Raises:
        ValueError: if the batch size cannot be shared among processes and accumulated batches.
    """
    preset, settings = plan.preset, plan.settings
    world = _world(settings.device)
    shares = world * settings.accumulate
    if preset.batch_size % shares:
        raise ValueError(
            f"batch_size={preset.batch_size} cannot be shared by {world} processes that "
            f"accumulate {settings.accumulate} batches: make it a multiple of {shares}"
        )
    per_device = preset.batch_size // shares
    epoch = math.ceil(math.ceil(samples / world / per_device) / settings.accumulate)
    steps = settings.steps or max(1, math.ceil(epoch * preset.epochs))
    every = settings.eval_every or min(epoch, steps)
    strategy = "steps" if measures else "no"
    kept = settings.keep_checkpoints
    best = preset.select_best and measures and kept > 0
    # Before version 5 transformers takes an earlier run's from here.
    os.environ["ACCELERATE_MIXED_PRECISION"] = _MIXED[preset.precision]
    args = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=settings.eval_batch_size or per_device,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=preset.learning_rate,
        weight_decay=preset.weight_decay,
        lr_scheduler_type="constant_with_warmup"
        if preset.schedule == "constant"
        else preset.schedule,
        warmup_steps=round(preset.warmup * steps),
        logging_strategy="steps",
        logging_steps=min(settings.log_every, steps),
        eval_strategy=strategy,
        eval_steps=every if measures else None,
        save_strategy="steps" if kept else "no",
        save_steps=every,
        save_total_limit=max(kept, 2 if best else 0) or None,  # the best one, and the last
        load_best_model_at_end=best,
        metric_for_best_model=f"eval_{task.best}" if best else None,
        greater_is_better=not task.lower_is_better if best else None,
        bf16=preset.precision == "bfloat16",
        fp16=preset.precision == "float16",
        gradient_checkpointing=settings.gradient_checkpointing,
        **_checkpointing(settings.gradient_checkpointing),
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=settings.device != "cpu" and torch.cuda.is_available(),
        seed=torch_seed(settings.seed) % 2**32,
        use_cpu=settings.device == "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    if args.device.type == "cuda":  # a process has one: with several, each step would take more
        args._n_gpu = 1
    return args


def _prepare(folder: Path, overwrite: bool) -> None:
    require_writable_folder(folder)
    if overwrite:
        for name in (CHECKPOINTS, BEGUN, *_RESULTS):
            remove(folder / name)
        for path in folder.glob("generated-*.json"):
            remove(path)


def _begun(folder: Path) -> Mapping[str, Any]:
    path = folder / BEGUN
    return read_json_object(path, "a run's settings") if path.exists() else {}


def _begin(folder: Path, task: Task, plan: Plan, adapted: Adapted) -> None:
    """What a run is, for whoever goes on with it."""
    record = {
        "task": task.name,
        "initialisation": write_report(adapted.report, folder),
        **plan.to_dict(),
    }
    write_json_atomic(folder / BEGUN, finite_or_null(record))


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Checkpointing that lets gradients through where the first layers are frozen."""
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    kinds = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    name = next(name for name in kinds if name in names)
    return {name: {"use_reentrant": False}} if wanted else {}


def _trainer(
    task: Task,
    plan: Plan,
    adapted: Adapted,
    args: TrainingArguments,
    train: Any,
    splits: Mapping[str, Any],
    callbacks: tuple[TrainerCallback, ...],
) -> TaskTrainer:
    preset, rate = plan.preset, plan.settings.head_learning_rate
    initial = initial_factors(adapted.model)
    own = [ConvertedCheckpoints(), *callbacks]
    if initial and preset.weight_decay:
        own.append(DecayToInitialisation(initial, preset.weight_decay))
    if adapted.after_step is not None:
        own.append(AfterStep(adapted.after_step))
    kind = TaskTrainer
    if preset.adapter == "lava":
        kind = with_orthogonality(TaskTrainer)
    elif _needs_adalora_term(adapted.model):
        kind = with_orthogonality(TaskTrainer, AdaLoraOrthogonality)
    trainer = kind(
        task,
        layer_decay=preset.layer_decay if preset.method == "full" else 1.0,
        decay_to_zero=not initial,
        lora_plus=preset.lora_plus,
        head_rates=dict.fromkeys(preset.head, rate) if rate else {},
        model=adapted.model,
        args=args,
        train_dataset=train,
        eval_dataset=next(iter(splits.values()), None),
        callbacks=own,
    )
    trainer.remove_callback(PrinterCallback)  # the reporter tells
    return trainer


def _needs_adalora_term(model: nn.Module) -> bool:
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return isinstance(config, AdaLoraConfig) and config.task_type is None  # peft adds it otherwise


def _measured(trainer: TaskTrainer, name: str, split: Any) -> dict[str, float]:
    step, found = trainer.measured
    last = step == trainer.state.global_step and not trainer.args.load_best_model_at_end
    if not last or split is not trainer.eval_dataset:
        found = trainer.evaluate(split, metric_key_prefix="final")
    generated = gather_object(trainer.task.generated)  # each process has written a part
    if generated and trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir)).parent
        write_json_atomic(folder / f"generated-{name}.json", generated)
    named = {key.partition("_")[2]: value for key, value in found.items() if key != "epoch"}
    return {key: float(value) for key, value in named.items() if not key.endswith(TIMES)}


def _share(plan: Plan, args: TrainingArguments) -> tuple[int, int]:
    """Which part of the data a process reads: peft's methods read all on every process."""
    preset = plan.preset
    together = preset.adapter == "lava" or get_method(preset.method).family == "cntlora"
    return (args.process_index, args.world_size) if together else (0, 1)


def _world(device: str | None) -> int:
    """How many processes train together, which Accelerate finds out as the Trainer does."""
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu").num_processes


def _write(result: TaskResult, task: Task, plan: Plan, adapted: Adapted, name: str) -> None:
    folder = result.folder
    save_adapter(result.model, folder, plan.preset.method)
    record = {
        "task": task.name,
        "method": name,
        "metrics": result.metrics,
        "best": task.best,
        "trained_parameters": result.trained_parameters,
        "seconds": result.seconds,
        "initialisation": _begun(folder).get("initialisation", {}),
        **plan.to_dict(),
        "versions": {
            "cntlora": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        },
        "device": str(next(result.model.parameters()).device),
        "threads": torch.get_num_threads(),
    }
    write_json_atomic(folder / "curves.json", finite_or_null(result.curves.to_dict()))
    plot_curves({name: result.curves}, folder / "curves.png", task.name)
    write_json_atomic(folder / "metrics.json", finite_or_null(record))
