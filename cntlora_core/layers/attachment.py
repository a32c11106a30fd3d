"""Attachment points: the linear maps of a model that get an adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cntlora_core.layers.unfolding import unfolded_rows, unfolded_width
from cntlora_core.layers.weights import weight_matrix

KINDS = "nn.Linear, transformers' Conv1D, nn.Conv2d"


@dataclass(frozen=True)
class AttachmentPoint:
    """One linear map of a model that gets an adapter.

    Attributes:
        name: The module's dotted path in the model.
        module: The module itself; its weight is read, never written, through this class.
        in_features: Width d_in of the input rows that the map reads; of a convolution, of its
            unfolded input: channels times kernel area.
        out_features: Width d_out of what it gives.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    in_features: int
    out_features: int

    @property
    def max_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def reading(self) -> tuple[object, ...]:
        """How the module looks at a tensor: two that look alike at one read the same rows."""
        m = self.module
        if isinstance(m, nn.Conv2d):
            return m.in_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.padding_mode
        return (self.in_features,)

    def weight(self) -> Tensor:
        """The frozen weight as a (d_out, d_in) float32 matrix; dequantised where it has to be.

        Raises:
            TypeError: if it cannot be read, saying why.
        """
        return weight_matrix(self.name, self.module)

    def input_rows(self, x: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """An input of the module as rows (n, d_in) that its weight multiplies, chunk by chunk.

        Args:
            x: What the module reads.
            mask: (batch, tokens), true for the tokens that count; the others are left out of inputs
                of shape (batch, tokens, ..., d_in), or (batch * tokens, d_in) in that order. Inputs
                of other shapes, and what a convolution reads, count in full.
        """
        if isinstance(self.module, nn.Conv2d):
            return unfolded_rows(self.module, x)
        if mask is not None and x.ndim >= 3 and x.shape[:2] == mask.shape:
            x = x[mask.to(x.device)]
        elif mask is not None and x.ndim == 2 and x.shape[0] == mask.numel():
            x = x[mask.flatten().to(x.device)]
        return iter((x.reshape(-1, self.in_features),))


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
        ValueError: if it is no linear map, or one that no adapter fits.
    """
    if isinstance(module, nn.Linear):
        return AttachmentPoint(name, module, module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return AttachmentPoint(name, module, d_in, d_out)
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            raise ValueError(
                f"target_modules matches {name!r}, a convolution in {module.groups} groups: peft's "
                "adapter reads the channels of all groups at once, which no change of the grouped "
                "kernel does, and cannot be merged; leave it out with exclude_modules"
            )
        return AttachmentPoint(name, module, unfolded_width(module), module.out_channels)
    if isinstance(module, LoraLayer):
        raise ValueError(
            f"{name!r} carries an adapter already: give the base model, or unload the adapter first"
        )
    if hasattr(module, "qweight") or hasattr(module, "W_q"):  # GPTQ, AWQ; HQQ
        raise ValueError(
            f"target_modules matches {name!r}, a {type(module).__name__}, quantised in a form that "
            "cannot be read here: load the base model in a floating-point type, or quantised by "
            "bitsandbytes or torchao"
        )
    raise ValueError(
        f"target_modules matches {name!r}, a {type(module).__name__}; a data-driven "
        f"initialisation is known for linear maps ({KINDS}): narrow target_modules"
    )


def _example_names(model: nn.Module, count: int = 4) -> list[str]:
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, nn.Conv2d))]
    return names[:: max(1, len(names) // count)][:count]
