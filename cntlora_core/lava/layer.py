"""LAVA's adapter of one module."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from cntlora_core.lava.config import LavaConfig
from cntlora_core.lava.functional import convolve, delta, factor_names, linear
from cntlora_core.layers.weights import quantised_as

_TOLD = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
         "padding_mode")  # fmt: skip
KINDS = "nn.Linear, transformers' Conv1D, nn.Conv1d and nn.Conv2d"


class LavaLayer(nn.Module, BaseTunerLayer):
    """A module with one or several sums of rank-1 terms beside its weight.

    ``W + alpha / r * sum_r U[:, r] o V[:, r] o Y[:, r] o X[:, r]``, with one factor for each
    dimension of the weight: U (c_out, r), V (c_in / groups, r), Y (kh, r), X (kw, r).

    Args:
        base_layer: The module, frozen.
        adapter_name: The adapter's name.
        r: Its rank.
        lava_alpha: Its alpha.
        config: Its other settings.
    """

    adapter_layer_names = ("lava_U", "lava_V", "lava_Y", "lava_X")
    other_param_names = ("r", "lava_alpha", "scaling", "lava_dropout", "lava_config")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lava_alpha: float,
        config: LavaConfig,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lava_U, self.lava_V = nn.ParameterDict(), nn.ParameterDict()
        self.lava_Y, self.lava_X = nn.ParameterDict(), nn.ParameterDict()
        self.lava_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lava_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lava_config: dict[str, LavaConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        base, shape = self.get_base_layer(), weight_shape(self.get_base_layer())
        self.out_features = shape[0]
        self.in_features = shape[1] * int(getattr(base, "groups", 1))
        for name in _TOLD:  # another method's layer around this one asks for these
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        self.factor_names = factor_names(len(shape))
        self.update_layer(adapter_name, r, lava_alpha, config)

    def update_layer(
        self, adapter_name: str, r: int, lava_alpha: float, config: LavaConfig
    ) -> None:
        """Add an adapter, or initialise one anew."""
        self.r[adapter_name], self.lava_alpha[adapter_name] = r, lava_alpha
        self.scaling[adapter_name] = lava_alpha / r
        self.lava_config[adapter_name] = config
        dropout = nn.Dropout(config.lava_dropout) if config.lava_dropout else nn.Identity()
        self.lava_dropout[adapter_name] = dropout
        shape = weight_shape(self.get_base_layer())
        for name, size in zip(self.factor_names, shape, strict=True):
            self._factor_dict(name)[adapter_name] = nn.Parameter(torch.empty(size, r))
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """Initialise an adapter anew: see ``init_weights`` of :class:`LavaConfig`."""
        factors = self.factors(adapter_name)
        if factors["U"].is_meta:
            return
        for name in ("Y", "X"):
            if name in factors:  # columns of length 1, so that the terms are of V's size
                nn.init.normal_(factors[name])
                factors[name].div_(factors[name].norm(dim=0))
        bound = 1 / math.sqrt(factors["V"].shape[0])  # Kaiming's, as in peft's LoRA
        factors["V"].uniform_(-bound, bound)
        u = torch.empty_like(factors["U"], dtype=torch.float32)  # half precision has no QR
        factors["U"].copy_(nn.init.orthogonal_(u))
        if init_weights == "lora":
            factors["U"].zero_()
        elif init_weights:
            factors["V"].zero_()

    def _factor_dict(self, name: str) -> nn.ParameterDict:
        return getattr(self, f"lava_{name}")

    def factors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The adapter's factors by their names, in the order of the weight's dimensions."""
        return {name: self._factor_dict(name)[adapter_name] for name in self.factor_names}

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The scaled change of weight, in the weight's own shape; float32 at the least."""
        factors = [factor.detach() for factor in self.factors(adapter_name).values()]
        if factors[0].dtype in (torch.bfloat16, torch.float16):
            factors = [factor.float() for factor in factors]
        change = self.scaling[adapter_name] * delta(factors[0], factors[1], factors[2:])
        return change.T if isinstance(self.get_base_layer(), Conv1D) else change

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name in self.lava_U:
                result = result + self._change(adapter_name, x)
        return result.to(dtype)

    def _change(self, adapter_name: str, x: Tensor) -> Tensor:
        u, v, *spatial = self.factors(adapter_name).values()
        x = self.lava_dropout[adapter_name](self._cast_input_dtype(x, u.dtype))
        u = u * self.scaling[adapter_name]
        base = self.get_base_layer()
        if isinstance(base, (nn.Conv1d, nn.Conv2d)):
            return convolve(x, u, v, spatial, base)
        return linear(x, u, v)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters (or those named) to the base weight.

        Raises:
            ValueError: for a quantised weight, or with ``safe_merge`` for one that would not be
                finite.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.lava_U:
                continue
            weight = self._mergeable_weight()
            change = self.get_delta_weight(adapter_name).to(weight.device)
            merged = (weight + change).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"adapter {adapter_name!r} would make the weight of a "
                    f"{type(self.get_base_layer()).__name__} not finite: it was not merged there; "
                    "unmerge_adapter() takes it out of the modules before"
                )
            weight.copy_(merged)
            self.merged_adapters.append(adapter_name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight; exact but for rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self.lava_U:
                weight = self._mergeable_weight()
                weight.copy_(weight - self.get_delta_weight(adapter_name).to(weight.device))

    def _mergeable_weight(self) -> Tensor:
        base = self.get_base_layer()
        stored = quantised_as(base)
        if stored is not None:
            raise ValueError(
                f"the base weight is {stored}, and would be rounded anew: load the base model in a "
                "floating-point type to merge"
            )
        assert isinstance(base.weight, Tensor)
        return base.weight.data

    def set_scale(self, adapter: str, scale: float) -> None:
        """The adapter at ``scale`` times its strength, as diffusers' ``set_adapters`` asks."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.lava_alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.scaling[adapter_name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo :meth:`scale_layer`; without a number, back to the adapter's own strength."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                if scale is None:
                    self.set_scale(adapter_name, 1.0)
                else:
                    self.scaling[adapter_name] /= scale

    def __repr__(self) -> str:
        return "lava." + super().__repr__()


class LavaLinear(LavaLayer):
    """The adapter of a matrix: peft knows by the name what ``"all-linear"`` is for."""


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """(c_out, c_in / groups, kh, kw); (d_out, d_in) of a matrix, whatever way it is stored."""
    if isinstance(module, nn.Linear):  # quantised ones pack their weight
        return module.out_features, module.in_features
    assert isinstance(module.weight, Tensor)
    shape = tuple(module.weight.shape)
    return shape[::-1] if isinstance(module, Conv1D) else shape


def check_adaptable(name: str, module: nn.Module) -> None:
    """Refuse a module whose change of weight is no such sum, or that computes something else.

    Raises:
        ValueError: naming the module and what can be done.
    """
    kind = type(module).__name__
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"target_modules matches {name!r}, the last matrix of an nn.MultiheadAttention, which "
            "reads its weight without calling it: an adapter would do nothing. Name it in "
            "exclude_modules"
        )
    computed = "weight" not in module._parameters and "weight" not in module._buffers
    if computed and isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(
            f"target_modules matches {name!r}, a {kind} whose weight is computed anew each time "
            "(weight or spectral normalisation, a parametrization): take that off first, or name "
            "it in exclude_modules"
        )
    if isinstance(module, (nn.Linear, Conv1D)):
        return
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        why = "transposed convolutions, 3-D ones and " if "Conv" in kind else ""
        raise ValueError(
            f"target_modules matches {name!r}, a {kind}; LAVA is for {KINDS}, not for {why}other "
            "modules: narrow target_modules, or name it in exclude_modules"
        )
    own = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Conv1d
    # One that changes its weight (standardises it, say) or pads in its own way before convolving.
    if (
        type(module).forward is not own.forward
        or type(module)._conv_forward is not own._conv_forward
    ):
        raise ValueError(
            f"target_modules matches {name!r}, a {kind}, which computes something else than "
            f"{own.__name__} does: LAVA's change would not be one of its weight. Name it in "
            "exclude_modules"
        )
