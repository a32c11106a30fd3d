"""Optimisers and learning-rate schedules of the training, and their state as tensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from cntlora_core.diffusion.settings import TrainingSettings


def build_optimizer(
    unet: list[nn.Parameter], text_encoder: list[nn.Parameter], training: TrainingSettings
) -> torch.optim.Optimizer:
    """The optimiser, without weight decay: its decay is towards 0, which is no initialisation.

    Args:
        unet: The denoiser's trained tensors: the first group.
        text_encoder: The text encoder's: a group with a learning rate of its own; may be none.
        training: Kind of the optimiser and learning rates.

    Raises:
        ImportError: The optimiser's package is not installed; see ``require_packages``.
    """
    groups: list[dict[str, Any]] = [{"params": unet, "lr": training.learning_rate}]
    if text_encoder:
        groups.append({"params": text_encoder, "lr": training.text_learning_rate})
    groups = [group for group in groups if group["params"]]
    device = groups[0]["params"][0].device
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    if training.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, use_bias_correction=True, safeguard_warmup=True)
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(groups, weight_decay=0.0)


def build_schedule(optimizer: torch.optim.Optimizer, training: TrainingSettings) -> Any:
    """The course of the learning rate, of diffusers' make."""
    return get_scheduler(
        training.lr_schedule,
        optimizer,
        step_rules=training.lr_step_rules,
        num_warmup_steps=training.lr_warmup,
        num_training_steps=training.steps,
        num_cycles=training.lr_cycles,
        power=training.lr_power,
    )


def effective_rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a group; Prodigy's is a factor of its own estimate ``d``."""
    return group["lr"] * group.get("d", 1.0)


@torch.no_grad()
def decay_towards(
    initial: Mapping[nn.Parameter, Tensor],
    optimizer: torch.optim.Optimizer,
    weight_decay: float,
    taken: Tensor | float = 1.0,
) -> None:
    """AdamW's decoupled weight decay, towards the initialisation p0 in place of 0.

    ``p - learning_rate * weight_decay * (p - p0)``. Where the frozen weight became ``W - s B0 A0``,
    a pull towards 0 would be one away from W.

    Args:
        initial: p0 of each parameter; empty for no decay.
        optimizer: Holds the parameters and their learning rates.
        weight_decay: As AdamW's.
        taken: 1 for a step that is taken, 0 for one that is skipped.
    """
    for group in optimizer.param_groups if initial else ():
        for parameter in group["params"]:
            if parameter.requires_grad:
                share = effective_rate(group) * weight_decay
                parameter.lerp_(initial[parameter], share * taken)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimiser knows.

    Args:
        optimizer: Of any kind whose state is tensors and JSON values.
        parameters: Its parameters by name.

    Returns:
        Its tensors by ``<kind>.<parameter>``, and the rest as JSON values: ``groups``, and
        ``state`` by parameter.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{kind}.{name}"] = value
            else:
                rest.setdefault(name, {})[kind] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return tensors, json.loads(json.dumps({"groups": groups, "state": rest}))


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any],
) -> None:
    """Inverse of :func:`optimizer_state`.

    Args:
        optimizer: Of the same kind, over the same groups; its state is replaced.
        parameters: Its parameters by name.
        tensors: As :func:`optimizer_state` gives them.
        rest: Likewise.
    """
    found: dict[str, dict[str, Any]] = {name: dict(of) for name, of in rest["state"].items()}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        found.setdefault(name, {})[kind] = tensor.clone()
    saved = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    saved["state"] = {i: found[name] for i, name in enumerate(order) if name in found}
    for group, values in zip(saved["param_groups"], rest["groups"], strict=True):
        group.update(values)
    optimizer.load_state_dict(saved)
