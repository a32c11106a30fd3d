"""LAVA's configuration, as peft keeps one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from peft.config import PeftConfig
from peft.utils import PeftType

from cntlora_core.config import FactorName, PlainInitialization


@dataclass
class LavaConfig(PeftConfig):
    """Settings of LAVA: low-rank changes of weight that keep a convolution's dimensions.

    Each weight of shape (c_out, c_in, kh, kw) gets (c_out + c_in + kh + kw) r parameters; a matrix
    (d_out + d_in) r, which is LoRA.

    Args:
        r: Rank: how many rank-1 terms the change is a sum of.
        lava_alpha: The change is multiplied by ``lava_alpha / r``.
        target_modules: Names (suffixes) of the modules that get an adapter, a regular expression,
            or "all-linear". nn.Linear, transformers' Conv1D, nn.Conv1d and nn.Conv2d can be named.
        exclude_modules: Names, or a regular expression, of modules that do not.
        rank_pattern: Rank of modules that differ, by a regular expression of the name.
        alpha_pattern: The same for ``lava_alpha``.
        lava_dropout: Probability of dropping an input of the adapter.
        orthogonality: Lambda of ``lambda * ||F.T F - I||^2``, which
            :func:`cntlora_core.lava.orthogonality_loss` gives a trainer to add to its loss. The
            paper's base is 0.1: for vision half to twice that, for text 1/32 of it to all of it.
        orthogonal_factors: The factors F in that sum, any of U (outputs), V (inputs), Y and X
            (kernel height and width); a layer leaves out those that it has not.
        init_weights: How an adapter is initialised. True or "orthogonal": U orthonormal columns, V
            zero. "lora": U zero, V Kaiming-uniform. Both start at the base model's output. False:
            no factor is zero (for tests).
        layers_to_transform: Indices of the layers that get adapters.
        layers_pattern: The name of the list that these are indices into.
        bias: "none", "all", or "lava_only": the biases that are trained.
        modules_to_save: Modules that are trained in full and saved.
    """

    r: int = 8
    lava_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lava_dropout: float = 0.0
    orthogonality: float = 0.1
    orthogonal_factors: list[FactorName] = field(default_factory=lambda: ["U"])
    init_weights: bool | PlainInitialization = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LAVA  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self.orthogonal_factors = checked_factors(self.orthogonal_factors)
        for name, values in (("r", [self.r]), ("rank_pattern", self.rank_pattern.values())):
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name}: a rank is a whole number of at least 1, got {value}")
        for name, value, below in (
            ("lava_dropout", self.lava_dropout, 1.0),
            ("orthogonality", self.orthogonality, math.inf),
        ):
            if not (_is_number(value) and 0 <= value < below):
                raise ValueError(f"{name} must lie between 0 and {below:g}, got {value}")
        for value in (self.lava_alpha, *self.alpha_pattern.values()):
            if not (_is_number(value) and math.isfinite(value) and value > 0):
                raise ValueError(f"lava_alpha must be a number above 0, got {value!r}")
        if self.init_weights not in (True, False, *get_args(PlainInitialization)):
            raise ValueError(
                "init_weights must be True, False or one of "
                f"{', '.join(get_args(PlainInitialization))}, got {self.init_weights!r}"
            )
        if self.bias not in ("none", "all", "lava_only"):
            raise ValueError(f"bias must be none, all or lava_only, got {self.bias!r}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} has no effect where target_modules is one string: name the layers in "
                    "the regular expression itself"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: the indices in that list")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checked_factors(names: Sequence[Any] | str | None) -> list[FactorName]:
    """The names of factors, each once, in their order; none of None.

    Raises:
        ValueError: for a name that no factor has.
    """
    known = get_args(FactorName)
    names = names or ()
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"orthogonal_factors may name {', '.join(known)}; got {wrong[0]!r}")
    return [name for name in known if name in names]
