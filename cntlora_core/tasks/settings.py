"""What a run of a recipe is told, and the presets that fill in what it is not told."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.methods.registry import get_method

AdapterKind = Literal["lora", "lava"]
Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["constant", "linear", "cosine"]
Bias = Literal["none", "all"]
LAVA_METHODS = ("cross", "self", "shift", "lora")
"""The initialisations that LAVA has; ``lora`` is the plain one."""

WITHOUT_UP_MATRICES = ("vera", "full", "bitfit")
_FREE_AT_RESUME = frozenset(
    ("output", "resume", "overwrite", "device", "workers", "eval_batch_size", "keep_checkpoints")
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Preset:
    """The settings of a source: data, not code.

    Attributes:
        source: Where they are from.
        model: Hub id.
        data: Hub id; empty where the data have none.
        targets: Which layers get an adapter: suffixes of their names, or a regular expression.
        head: Modules that are trained in full.
        method: The initialisation.
        adapter: lora or lava.
        rank: Rank of an adapted layer.
        alpha: The scaling is alpha / rank.
        dropout: Probability of dropping an input of an adapter.
        bias: Whether the model's biases are trained.
        orthogonality: LAVA's lambda.
        learning_rate: At its highest.
        weight_decay: Decoupled; an adapter whose base was rewritten decays to its initialisation.
        schedule: Of the learning rate.
        warmup: Share of the steps in which the learning rate rises.
        epochs: Passes over the training data.
        batch_size: Samples in a step, over all processes and accumulated batches.
        layer_decay: Factor of the learning rate from one layer to the one below, in full
            fine-tuning.
        precision: What products are computed in.
        base_precision: What the frozen weights are kept in.
        select_best: Whether the checkpoint with the best validation metric is the result.
        options: What only one recipe has.
        lora_plus: Learning rate of a LoRA's up matrices over that of its down matrices.
    """

    source: str
    model: str
    data: str
    targets: tuple[str, ...] | str
    head: tuple[str, ...] = ()
    method: str = "cross"
    adapter: AdapterKind = "lora"
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    bias: Bias = "none"
    orthogonality: float = 0.1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: Schedule = "linear"
    warmup: float = 0.0
    epochs: float = 1.0
    batch_size: int = 8
    layer_decay: float = 1.0
    precision: Precision = "float32"
    base_precision: Precision = "float32"
    select_best: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    lora_plus: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What every recipe is told. What is left out has the value of the preset.

    Attributes:
        output: Folder for the adapter, the metrics, the curves and the checkpoints.
        model: Hub id or folder of the base model.
        data: Hub id or folder of the data.
        method: How the adapter is initialised; `cntlora methods` describes them. full trains
            every weight.
        adapter: lora, or lava, which keeps a convolution's dimensions and is initialised by cross,
            self, shift or lora (plain).
        rank: Rank of an adapted layer (their mean where ranks vary).
        alpha: The scaling is alpha / rank.
        dropout: Probability of dropping an input of an adapter.
        targets: Suffixes of the names of the layers that get an adapter; a single word with a
            backslash, a star or a bar is a regular expression of the whole name.
        orthogonality: With lava: weight lambda of the orthogonality penalty.
        init_batches: How many batches the initialisation reads; 0 for all training data.
        learning_rate: At its highest.
        weight_decay: Decoupled weight decay.
        schedule: Of the learning rate: constant, linear or cosine.
        warmup: Share of the steps in which the learning rate rises.
        layer_decay: With full: factor of the learning rate from one layer to the one below.
        epochs: Passes over the training data.
        steps: Training steps, in place of epochs.
        batch_size: Samples in a step, over all processes and accumulated batches.
        accumulate: In how many parts a process takes its share of a batch.
        eval_batch_size: Samples measured at once by a process; default: those trained on at once.
        eval_every: Steps between two measurements and checkpoints; default: an epoch.
        log_every: Steps between two points of the training curve.
        keep_checkpoints: How many checkpoints are kept; 0 for none, and then a run cannot be
            resumed unless it was stopped by Ctrl-C.
        select_best: The checkpoint with the best validation metric is the result, not the last.
        max_train: Train on this many samples, taken at random.
        max_eval: Measure on this many samples of each split, taken at random.
        precision: What products are computed in.
        base_precision: What the frozen weights are kept in.
        gradient_checkpointing: Less memory for more time.
        workers: Processes that prepare samples.
        seed: Of the head, the order of the samples, dropout and the initialisation.
        device: cpu, or leave it out for the best there is.
        resume: Go on from the last checkpoint in the output folder.
        overwrite: Start anew where the output folder holds a run.
        cntlora: Further settings of the data-driven initialisation.
        lora_plus: Learning rate of a LoRA's up matrices over that of its down matrices; LoRA+
            (arXiv 2402.12354) takes 16.
        head_learning_rate: Of the modules that are trained in full, such as a fresh classifier;
            default: learning_rate.
    """

    output: str
    model: str | None = None
    data: str | None = None
    method: str | None = None
    adapter: AdapterKind | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] | None = None
    orthogonality: float | None = None
    init_batches: int = 32
    learning_rate: float | None = None
    weight_decay: float | None = None
    schedule: Schedule | None = None
    warmup: float | None = None
    layer_decay: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    eval_batch_size: int | None = None
    eval_every: int | None = None
    log_every: int = 10
    keep_checkpoints: int = 2
    select_best: bool | None = None
    max_train: int | None = None
    max_eval: int | None = None
    precision: Precision | None = None
    base_precision: Precision | None = None
    gradient_checkpointing: bool = False
    workers: int = 0
    seed: int = 0
    device: str | None = None
    resume: bool = False
    overwrite: bool = False
    cntlora: CNTLoRAConfig = field(default_factory=CNTLoRAConfig)
    lora_plus: float | None = None
    head_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.method is not None:
            get_method(self.method)
            if self.method == "from_lora":
                raise ValueError("method 'from_lora' needs a file, which the recipes do not take")
        self._require_numbers()
        for name, kind in (
            ("adapter", AdapterKind),
            ("schedule", Schedule),
            ("precision", Precision),
            ("base_precision", Precision),
        ):
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs say the same: give one of them")
        if self.select_best and not self.keep_checkpoints:
            raise ValueError("select_best needs checkpoints: keep_checkpoints must be at least 1")
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with a run, overwrite starts anew: give one of them")
        if self.device not in (None, "cpu"):
            raise ValueError(
                f"device must be cpu or left out, got {self.device!r}: the Trainer chooses the "
                "best device; CUDA_VISIBLE_DEVICES restricts it to one"
            )

    def _require_numbers(self) -> None:
        above_zero = ("alpha", "learning_rate", "epochs", "lora_plus", "head_learning_rate")
        at_least_zero = ("orthogonality", "weight_decay")
        counts = ("rank", "steps", "batch_size", "accumulate", "eval_batch_size", "eval_every")
        counts += ("log_every", "max_train", "max_eval")
        for name in (*above_zero, *at_least_zero):
            value = getattr(self, name)
            low = value is not None and (value < 0 or (value == 0 and name in above_zero))
            if low or (value is not None and not math.isfinite(value)):
                words = "above 0" if name in above_zero else "of at least 0"
                raise ValueError(f"{name} must be a number {words}, got {value}")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("init_batches", "workers", "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("dropout", "warmup"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")


@dataclass(frozen=True)
class Plan:
    """The settings of a run, none left open: a preset's, where the user gave none.

    Attributes:
        preset: With the user's values in it.
        settings: What the user gave.
    """

    preset: Preset
    settings: TaskSettings

    def to_dict(self) -> dict[str, Any]:
        """JSON values: ``settings`` as they were given, and ``decided`` as the run took them."""
        given = dataclasses.asdict(self.settings) | {"cntlora": self.settings.cntlora.to_dict()}
        return {"settings": given, "decided": dataclasses.asdict(self.preset)}


def planned(settings: TaskSettings, preset: Preset) -> Plan:
    """A preset under a user's settings.

    Raises:
        ValueError: for a method that LAVA has not.
    """
    names = {f.name for f in dataclasses.fields(Preset)}
    given = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if f.name in names and getattr(settings, f.name) is not None
    }
    targets = given.get("targets")
    if targets is not None and len(targets) == 1 and set(targets[0]) & set("\\*|()["):
        given["targets"] = targets[0]
    if "method" in given and get_method(given["method"]).peft_type is None:
        given["adapter"] = "lora"  # there is none
    if not settings.keep_checkpoints:
        given["select_best"] = False  # a preset may want it; a user who does is told to keep some
    found = dataclasses.replace(preset, **given)
    if found.method == "adalora" and found.select_best:
        raise ValueError(
            "adalora prunes ranks as it trains, so that an earlier checkpoint does not fit the "
            "model any more: give select_best=False (--no-select-best)"
        )
    if settings.lora_plus and (found.adapter == "lava" or found.method in WITHOUT_UP_MATRICES):
        raise ValueError(
            f"lora_plus is the learning rate of a LoRA's up matrices, which "
            f"{'LAVA' if found.adapter == 'lava' else found.method} has not: leave it out"
        )
    if found.adapter == "lava" and found.method not in LAVA_METHODS:
        raise ValueError(
            f"method={found.method!r} makes the two matrices of a LoRA; with adapter='lava' use "
            f"{', '.join(LAVA_METHODS)}, or give adapter='lora'"
        )
    return Plan(found, settings)


def check_same_run(begun: Mapping[str, Any], plan: Plan) -> None:
    """A run is resumed with the settings that it was begun with.

    Args:
        begun: Settings as JSON values, ``settings`` and ``decided``; empty if they are not known.
        plan: Those that are asked for now.

    Raises:
        ValueError: naming what differs.
    """
    asked = json.loads(json.dumps(plan.to_dict(), default=str))
    differing = [
        name
        for part in ("decided", "settings")
        for name, value in begun.get(part, {}).items()
        if name not in _FREE_AT_RESUME
        and not (part == "settings" and name in asked["decided"])
        and asked[part].get(name) != value
    ]
    if differing:
        raise ValueError(
            f"the run in {plan.settings.output} was begun with other settings; these differ: "
            f"{', '.join(differing)}. Give those of its run.json (--config "
            f"{plan.settings.output}/run.json), or start anew with overwrite"
        )


def preset_named(presets: Mapping[str, Value], name: str, what: str) -> Value:
    """One of several presets.

    Raises:
        ValueError: listing those that there are.
    """
    if name not in presets:
        raise ValueError(f"there is no preset {name!r} of {what}; there are {', '.join(presets)}")
    return presets[name]


def fresh_folder(settings: TaskSettings) -> Path:
    """The output folder, which must not hold a finished or begun run unless that is meant.

    Raises:
        ValueError: saying how to go on with the run or to start anew.
    """
    folder = Path(settings.output)
    held = [p for name in ("metrics.json", "checkpoints") if (p := folder / name).exists()]
    if held and not (settings.resume or settings.overwrite):
        raise ValueError(
            f"{folder} holds a run already ({held[0].name}): give resume to go on with it, "
            "overwrite to start anew, or another output folder"
        )
    return folder
