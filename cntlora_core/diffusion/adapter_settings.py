"""Settings of the adapter and its initialisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from cntlora_core.config import CNTLoRAConfig, Constraint, FactorName
from cntlora_core.diffusion.validation import (
    require_between,
    require_choice,
    require_defaults,
    require_finite,
    require_from_lora_alone,
    store_as_text,
)
from cntlora_core.methods.cntlora import settings_for
from cntlora_core.methods.registry import FROM_LORA, get_method, image_file_methods

if TYPE_CHECKING:
    Method = str
else:  # the names are the registry's, and pissa_niter_N stands for more than are listed
    Method = Literal[image_file_methods()] | str
AdapterKind = Literal["lora", "lava"]

MOST_RANKS = 10_000
"""Above the width of every layer of Stable Diffusion 1.5."""
LAVA_ONLY = ("convolutions", "orthogonality", "orthogonal_factors")
"""Settings that say something of LAVA alone."""


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter and its initialisation.

    Attributes:
        method: How the adapter is initialised; `cntlora methods` describes them.
        from_lora: A LoRA to go on from, in place of a method: any plain LoRA for the model (a file
            of any tool, peft's folder, or the folder of a run). Its layers, ranks and alphas stay,
            and no layer is added.
        adapter: lora, or lava, which keeps a convolution's dimensions and is initialised by cross,
            self, shift or lora (plain).
        rank: Rank of each attachment point (their mean where ranks vary).
        alpha: LoRA alpha; the scaling is alpha / rank; default: twice the rank.
        train_text_encoder: Adapt the text encoder's attention too.
        convolutions: With lava: adapt the denoiser's convolutions beside its attention.
        orthogonality: With lava: strength of the loss term that keeps a factor's columns
            orthonormal; 0 for none.
        orthogonal_factors: With lava: the factors that it acts on: U (outputs), V (inputs), Y and X
            (kernel height and width).
        init_passes: At how many timesteps each photo is read for the initialisation.
        init_minutes: After how many minutes an initialisation that iterates is given up; only EVA
            does.
        cntlora: Further settings of the data-driven initialisation.
    """

    method: Method = "cross"
    adapter: AdapterKind = "lora"
    rank: int = 16
    alpha: float | None = None
    train_text_encoder: bool = True
    convolutions: bool = True
    orthogonality: float = 0.1
    orthogonal_factors: tuple[FactorName, ...] = ("U",)
    init_passes: int = 4
    init_minutes: float = 60.0
    cntlora: CNTLoRAConfig = field(default_factory=CNTLoRAConfig)
    from_lora: str | None = None

    def __post_init__(self) -> None:
        store_as_text(self, "from_lora")
        require_from_lora_alone(self, AdapterSettings.method, FROM_LORA.name)
        method = get_method(self.method)
        method.require_image_file()
        require_between("rank", self.rank, 1, MOST_RANKS)
        require_between("init_passes", self.init_passes, 1, 10_000)
        for name in ("alpha", "init_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1e9:
                raise ValueError(f"{name} must be a positive number up to 1e9, got {value}")
        if method.family == "cntlora":
            constraint = cast(Constraint, self.method)
            object.__setattr__(self, "cntlora", settings_for(constraint, self.cntlora))
            self.cntlora.require_consistent()
        require_choice("adapter", self.adapter, AdapterKind)
        require_finite("orthogonality", self.orthogonality, 0)
        for name in self.orthogonal_factors:
            require_choice("orthogonal_factors", name, FactorName)
        if self.adapter == "lava":
            self._check_lava(method.family == "cntlora")
        else:
            require_defaults(self, LAVA_ONLY, f"with adapter={self.adapter!r}, but with lava")
        self.cntlora.to_dict()  # a run is recorded as JSON: refuse now what has no such form

    def _check_lava(self, closed_form: bool) -> None:
        if not closed_form and self.method != "lora":
            raise ValueError(
                f"method={self.method!r} makes the two matrices of a LoRA; with adapter='lava' use "
                "cross, self, shift or lora"
            )
        if self.cntlora.rank_budget == "parameters":
            raise ValueError(
                "rank_budget='parameters' counts a LoRA's parameters; with adapter='lava' use "
                "'ranks' or 'fixed'"
            )

    @property
    def lora_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.rank
