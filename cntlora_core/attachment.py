"""Attachment points: the linear maps of a model that get an adapter."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class AttachmentPoint:
    """One linear map of a model that gets an adapter.

    Attributes:
        name: The module's dotted path in the model.
        module: The module itself; its weight is read, never written, through this class.
        in_features: Width d_in of the input rows that the map reads.
        out_features: Width d_out of what it gives.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    in_features: int
    out_features: int

    @property
    def max_rank(self) -> int:
        return min(self.in_features, self.out_features)

    def weight(self) -> Tensor:
        """The frozen weight as a (d_out, d_in) float32 matrix."""
        weight = self.module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(
                f"attachment point {self.name!r} has a weight of {getattr(weight, 'dtype', None)}; "
                "only floating-point weights can be read: load the base model unquantised"
            )
        weight = weight.detach()
        return (weight.T if isinstance(self.module, Conv1D) else weight).float()

    def input_rows(self, x: Tensor) -> Tensor:
        """An input of the module as the rows (n, d_in) that its weight multiplies."""
        return x.reshape(-1, self.in_features)


def find_attachment_points(
    model: nn.Module, lora_config: LoraConfig, prefix: str = ""
) -> list[AttachmentPoint]:
    """The modules that peft would wrap under ``lora_config``, in the model's own order.

    Args:
        model: The base model, not yet wrapped.
        lora_config: Its ``target_modules``, ``exclude_modules`` and ``layers_to_transform`` decide.
        prefix: Put before each name, for example ``"unet."`` where several models are joined.

    Raises:
        ValueError: if nothing matches, or a match is no linear map.
    """
    if not lora_config.target_modules:
        raise ValueError(
            "target_modules is empty: name the linear layers that get an adapter, for example "
            f"{_example_names(model)}, or 'all-linear'"
        )
    chosen = _maybe_include_all_linear_layers(copy.deepcopy(lora_config), model)
    points = []
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(chosen, name):
            continue
        points.append(attachment_point(prefix + name, module))
    if not points:
        raise ValueError(
            f"target_modules={lora_config.target_modules!r} matches no module of "
            f"{type(model).__name__}; linear modules are named, for example, "
            f"{_example_names(model)}"
        )
    return points


def attachment_point(name: str, module: nn.Module) -> AttachmentPoint:
    """The attachment point that a module is.

    Raises:
        ValueError: if it is no linear map.
    """
    if isinstance(module, nn.Linear):
        return AttachmentPoint(name, module, module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return AttachmentPoint(name, module, d_in, d_out)
    if isinstance(module, LoraLayer):
        raise ValueError(
            f"{name!r} carries an adapter already: give the base model, or unload the adapter first"
        )
    raise ValueError(
        f"target_modules matches {name!r}, a {type(module).__name__}; a data-driven start is known "
        "for linear layers (nn.Linear, transformers' Conv1D): narrow target_modules"
    )


def _example_names(model: nn.Module, count: int = 4) -> list[str]:
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    return names[:: max(1, len(names) // count)][:count]


@torch.no_grad()
def subtract_from_weight(module: nn.Module, delta: Tensor) -> float:
    """Write ``W - delta`` into a module's weight, in the weight's own dtype.

    Args:
        module: The base module (not an adapter wrapper).
        delta: (d_out, d_in) float32.

    Returns:
        The Frobenius norm of what rounding to the weight's dtype lost, relative to the weight's.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, Conv1D):
        delta = delta.T
    wanted = weight.float() - delta.to(weight.device)
    scale = weight.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
    weight.copy_(wanted)
    return float((weight.float() - wanted).norm() / scale)
