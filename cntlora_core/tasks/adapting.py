"""From a base model and a method's name to a model that trains, and from it to a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from cntlora_core.adapter.inject import AdapterPlan, adapter_layers, adapter_weights
from cntlora_core.adapter.record import base_is_rewritten, record_of
from cntlora_core.config import Constraint
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.lava import LavaConfig, get_lava_model
from cntlora_core.lava.inject import adaptable_modules, lava_layers
from cntlora_core.methods import get_method, initialize_adapter
from cntlora_core.methods.cntlora import settings_for
from cntlora_core.runtime.files import save_safetensors_atomic, write_json_atomic
from cntlora_core.runtime.progress import Reporter, stage_progress
from cntlora_core.runtime.seeds import torch_seed
from cntlora_core.saving.conversion import save_converted
from cntlora_core.saving.load_initialized import load_initialized
from cntlora_core.tasks.data import shuffled
from cntlora_core.tasks.settings import Plan, Preset

ForwardFn = Callable[[nn.Module, Any], Any]
MaskFn = Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class Adapted:
    """A model that is ready to be trained.

    Attributes:
        model: A :class:`peft.PeftModel`; for full fine-tuning the base model itself.
        report: What the initialisation did; None where there was none.
        after_step: To be called after the optimizer's step with the number of steps done.
    """

    model: nn.Module
    report: InitializationReport | None = None
    after_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Reading:
    """How the initialisation reads a task's data.

    Attributes:
        batches: As the model is trained on them.
        forward_fn: ``forward_fn(model, batch)``; default: ``model(**batch)``.
        mask_fn: Which tokens count; default: the model's own masks.
        loss_fn: ``loss_fn(model, batch)`` for LoRA-GA; default: the output's ``loss``.
    """

    batches: Iterable[Any]
    forward_fn: ForwardFn | None = None
    mask_fn: MaskFn | None = None
    loss_fn: ForwardFn | None = None


def adapt(
    model: nn.Module,
    plan: Plan,
    reading: Reading,
    *,
    steps: int,
    reporter: Reporter,
    config: PeftConfig | None = None,
) -> Adapted:
    """Make a base model ready to be trained as the settings say.

    Args:
        model: The base model; its targeted layers are wrapped in place.
        plan: Method, adapter, ranks and so on.
        reading: The data, for methods that read some.
        steps: How many training steps will follow.
        reporter: Told of the passes over the data.
        config: An adapter of peft's own in place of the registry's methods.

    Raises:
        ValueError: if no layer is of the targets' names, or the method cannot do what is asked.
    """
    preset, settings = plan.preset, plan.settings
    if config is not None:
        torch.manual_seed(torch_seed(settings.seed))
        return Adapted(get_peft_model(cast(PreTrainedModel, model), config))
    progress = stage_progress(reporter, f"reading data for {preset.method}")
    if preset.adapter == "lava":
        return _lava(model, plan, reading, progress)
    method = get_method(preset.method)
    initialized = initialize_adapter(
        model,
        lora_config(preset),
        method,
        reading.batches if method.needs != "nothing" else None,
        forward_fn=reading.forward_fn,
        mask_fn=reading.mask_fn,
        loss_fn=reading.loss_fn,
        cntlora_config=_cntlora(plan) if method.family == "cntlora" else None,
        steps=steps,
        seed=settings.seed,
        progress=progress,
    )
    return Adapted(
        initialized.model,
        initialized.report,
        initialized.after_step if preset.method == "adalora" else None,
    )


def adapt_again(base: nn.Module, plan: Plan, checkpoint: Path) -> Adapted:
    """The model of a checkpoint, to train on.

    Raises:
        ValueError: for AdaLoRA, which has pruned by a schedule that cannot be taken up, and for a
            base that is not the checkpoint's.
    """
    method = plan.preset.method
    if get_method(method).peft_type is None:
        adapted = initialize_adapter(base, lora_config(plan.preset), method)
        return Adapted(adapted.model)  # the Trainer loads its weights
    if method in ("adalora", "loftq"):
        raise ValueError(
            f"a run of {method!r} cannot be taken up again, since a checkpoint does not hold all "
            "of its state: start anew with overwrite"
        )
    return Adapted(load_initialized(base, checkpoint, is_trainable=True))


def require_autocast(model: nn.Module, preset: Preset) -> None:
    """Nothing is trained in a base of fewer bits without autocast, see :func:`train_in_float32`.

    Args:
        model: The base, not wrapped.
        preset: Says what of it is trained.

    Raises:
        ValueError: naming what is trained.
    """
    if preset.precision != "float32":
        return
    bits = preset.bias == "all" or preset.method == "bitfit"
    for name, parameter in model.named_parameters():
        own = any(f".{head}." in f".{name}" for head in preset.head)
        if _is_short(parameter) and (own or (bits and name.endswith("bias"))):
            raise ValueError(
                f"base_precision={preset.base_precision!r} is for what stays as it is, and {name} "
                f"is trained: give precision={preset.base_precision!r} too, or "
                "base_precision='float32'"
            )


def train_in_float32(model: nn.Module) -> None:
    """Float32 for what is trained in a base of fewer bits, such as heads and biases: AdamW's steps
    would be rounded away there. Autocast brings the two together.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(p.requires_grad for p in own):
            for parameter in own:  # a norm's weight and bias have one data type
                if _is_short(parameter) and (parameter.requires_grad or parameter.ndim == 1):
                    parameter.data = parameter.data.float()


def _is_short(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def save_adapter(model: nn.Module, folder: Path, method: str) -> Path:
    """Write what was trained so that it fits the stock base; returns the folder.

    An adapter goes to ``folder/adapter``, for ``PeftModel.from_pretrained``; a fully fine-tuned
    model to ``folder/model``. LoftQ's quantised base, which its adapter fits, goes to
    ``folder/base``.
    """
    if not isinstance(model, PeftModel):
        return _save_model(model, folder / "model", model.state_dict())
    target = folder / "adapter"
    if base_is_rewritten(model):
        save_converted(model, target)
    else:
        model.save_pretrained(str(target))
    if method == "loftq":
        base = model.get_base_model()
        weights = {_stock_name(n): t for n, t in base.state_dict().items() if _is_stock(n)}
        _save_model(base, folder / "base", weights)
    return target


def _save_model(model: nn.Module, folder: Path, weights: Mapping[str, Tensor]) -> Path:
    if isinstance(model, PreTrainedModel):
        cast(Any, model).save_pretrained(str(folder), state_dict=weights)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors_atomic(weights, folder / "model.safetensors")
    return folder


def initial_factors(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The initial values of an adapter whose base was rewritten; empty where it was not."""
    if not isinstance(model, PeftModel) or (record := record_of(model)) is None:
        return {}
    found: dict[nn.Parameter, Tensor] = {}
    if isinstance(record.plan, AdapterPlan):
        for name, layer in adapter_layers(model).items():
            factors = record.plan.factors[name]
            down, up = adapter_weights(layer, "default")
            found[cast(nn.Parameter, down)] = factors.down.reshape(down.shape)
            found[cast(nn.Parameter, up)] = factors.up.reshape(up.shape)
        return found
    for name, layer in lava_layers(model, "default").items():
        named = record.plan.factors[name].named()
        found |= {parameter: named[key] for key, parameter in layer.factors("default").items()}
    return found


def lora_config(preset: Preset) -> LoraConfig:
    """peft's configuration of a preset's adapter."""
    return LoraConfig(
        r=preset.rank,
        lora_alpha=preset.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=preset.dropout,
        bias=preset.bias,
        target_modules=_targets(preset),
        modules_to_save=list(preset.head) or None,
    )


def lava_config(preset: Preset) -> LavaConfig:
    """LAVA's configuration of a preset's adapter."""
    return LavaConfig(
        r=preset.rank,
        lava_alpha=preset.alpha,
        lava_dropout=preset.dropout,
        orthogonality=preset.orthogonality,
        bias=preset.bias,
        target_modules=_targets(preset),
        modules_to_save=list(preset.head) or None,
    )


def initialization_batches(
    dataset: Sequence[Any],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    *,
    batch_size: int,
    count: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Iterable[Any]:
    """Batches of samples taken at random, made anew in each pass.

    Args:
        dataset: Samples.
        collate: Makes a batch of a list of samples.
        batch_size: Samples in a batch.
        count: How many batches; 0 for all.
        seed: Which samples.
        share: (which process, of how many): every process takes its part.
        device: Where the tensors of a batch are put.
    """
    order = shuffled(len(dataset), seed)
    chosen = order[: count * batch_size or len(dataset)][share[0] :: share[1]]
    return _Batches(dataset, collate, chosen, batch_size, device)


@dataclass(frozen=True)
class _Batches:
    dataset: Sequence[Any]
    collate: Callable[[list[Any]], Mapping[str, Any]]
    chosen: Sequence[int]
    batch_size: int
    device: torch.device | str

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.chosen), self.batch_size):
            indices = self.chosen[start : start + self.batch_size]
            batch = self.collate([self.dataset[i] for i in indices])
            yield {
                name: value.to(self.device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }


def write_report(report: InitializationReport | None, folder: Path) -> dict[str, Any]:
    """The ranks of an initialisation to ``folder/ranks.json``, and its times for the record."""
    if report is None:
        return {}
    if report.ranks:
        write_json_atomic(folder / "ranks.json", report.ranks)
    return {
        "pass_seconds": report.pass_seconds,
        "solve_seconds": report.solve_seconds,
        "notes": list(report.notes),
    }


def _lava(model: nn.Module, plan: Plan, reading: Reading, progress: Any) -> Adapted:
    config = lava_config(plan.preset)
    if plan.preset.method == "lora":
        adaptable_modules(model, config)  # names what does not match better than peft does
        torch.manual_seed(torch_seed(plan.settings.seed))
        return Adapted(get_peft_model(cast(PreTrainedModel, model), config))
    wrapped = get_lava_model(
        model,
        config,
        _cntlora(plan),
        reading.batches,
        forward_fn=reading.forward_fn,
        mask_fn=reading.mask_fn,
        progress=progress,
    )
    return Adapted(wrapped, getattr(wrapped, "lava_report", None))


def _cntlora(plan: Plan) -> Any:
    return settings_for(cast(Constraint, plan.preset.method), plan.settings.cntlora)


def _targets(preset: Preset) -> list[str] | str:
    return preset.targets if isinstance(preset.targets, str) else list(preset.targets)


def _is_stock(name: str) -> bool:
    return not any(part in name for part in (".lora_", "modules_to_save."))


def _stock_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
