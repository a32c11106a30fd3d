"""The record of a method: what it reads, what it changes, and what a file can hold of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.report import InitializationReport

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from cntlora_core.activations.capture import ForwardFn
    from cntlora_core.activations.collection import ProgressFn
    from cntlora_core.activations.token_masks import MaskFn
    from cntlora_core.adapter.inject import AdapterPlan
    from cntlora_core.layers.attachment import AttachmentPoint
    from cntlora_core.lora_file.algebra import LoRALayer

Family = Literal["cntlora", "peft"]
Needs = Literal["nothing", "activations", "gradients"]
PeftType = Literal["LORA", "ADALORA", "VERA"]
ImageFile = Literal["as trained", "trained minus initial"]


@dataclass(frozen=True)
class Limits:
    """How long an initialisation that iterates may go on; only EVA does.

    Attributes:
        max_passes: Passes over the data.
        max_seconds: Time; None for as long as it takes.
        held_bytes: How much of what layers read may be held in memory at a time. EVA ends soonest
            where that is a whole pass over the data.
    """

    max_passes: int = 100
    max_seconds: float | None = None
    held_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.max_passes < 1:
            raise ValueError(f"max_passes must be at least 1, got {self.max_passes}")
        if self.max_seconds is not None and not (
            math.isfinite(self.max_seconds) and self.max_seconds > 0
        ):
            raise ValueError(f"max_seconds must be a positive number, got {self.max_seconds}")
        if self.held_bytes < 0:
            raise ValueError(f"held_bytes must be at least 0, got {self.held_bytes}")


@dataclass(frozen=True)
class InitializationRequest:
    """What an initialisation is computed from.

    Attributes:
        model: What ``forward_fn`` is given.
        points: Attachment points within it.
        rank: Rank of each point; where a method shares ranks out, their mean.
        scaling: alpha / r.
        batches: The data; None where the method reads none.
        forward_fn: ``forward_fn(model, batch)`` runs one forward pass.
        mask_fn: Which tokens count: see :meth:`.TokenMasks.begin`.
        loss_fn: ``loss_fn(model, batch)`` gives the loss of a batch, a scalar tensor.
        lora_config: peft's configuration, for the settings of EVA, CorDA, LoRA-GA and LoftQ.
        cntlora_config: Settings of CNTLoRA's own variants.
        steps: How many training steps will follow; AdaLoRA's schedule depends on them.
        seed: Seed of all that is random in the initialisation.
        limits: When to give an iteration up.
        lora: Layers of the LoRA that is gone on from, by the points' names; only for from_lora.
        passes_progress: Called with (batches done, total or 0).
        solve_progress: Called with (points solved, total).
    """

    model: nn.Module
    points: Sequence[AttachmentPoint]
    rank: int
    scaling: float
    batches: Iterable[Any] | None = None
    forward_fn: ForwardFn | None = None
    mask_fn: MaskFn | None = None
    loss_fn: ForwardFn | None = None
    lora_config: LoraConfig | None = None
    cntlora_config: CNTLoRAConfig | None = None
    steps: int | None = None
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    lora: Mapping[str, LoRALayer] | None = None
    passes_progress: ProgressFn | None = None
    solve_progress: ProgressFn | None = None


@dataclass(frozen=True)
class PlannedInitialization:
    """The initialisation of every attachment point, before any module is wrapped."""

    plan: AdapterPlan
    report: InitializationReport


@dataclass(frozen=True)
class WrappedModel:
    """A model that trains, where there is no plan to initialise it from.

    Attributes:
        model: A PeftModel, or for full fine-tuning the base model itself.
        report: What was done.
        plan: The initial factors, where the method has them.
        after_step: To be called with the number of steps done, after the optimizer's step and
            before the gradients are cleared; None where a method asks for nothing.
    """

    model: nn.Module
    report: InitializationReport
    plan: AdapterPlan | None = None
    after_step: Callable[[int], None] | None = None


PlanFn = Callable[[InitializationRequest], PlannedInitialization]
WrapFn = Callable[["nn.Module", "LoraConfig", InitializationRequest], WrappedModel]


@dataclass(frozen=True)
class Method:
    """One way to initialise, or to make, what is trained.

    Attributes:
        name: What it is called by.
        description: One line in a user's words.
        paper: Its reference.
        needs: What it reads besides the weights.
        rewrites_base: Whether the frozen weight changes before training (by default, where that is
            a setting).
        b_initialized_to_zero: Whether the up matrix is zero at first.
        preserves_output: Whether the first output is the base model's.
        family: ``cntlora`` for this library's own, ``peft`` for what peft computes.
        peft_type: peft's name for the kind of adapter; None for none.
        image_file: What a file for image tools holds: the adapter ``as trained``, or ``trained
            minus initial``, of twice the rank; None where no file would be right.
        image_file_note: Why there is none.
        plan: Initial factors of all points, for adapters that are plain LoRA once initialised.
        wrap: For all others: the wrapped model. One of the two is given.
    """

    name: str
    description: str
    paper: str
    needs: Needs
    rewrites_base: bool
    b_initialized_to_zero: bool
    preserves_output: bool = True
    family: Family = "peft"
    peft_type: PeftType | None = "LORA"
    image_file: ImageFile | None = "as trained"
    image_file_note: str = ""
    plan: PlanFn | None = field(default=None, repr=False, compare=False)
    wrap: WrapFn | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert (self.plan is None) != (self.wrap is None)
        assert (self.image_file is None) == bool(self.image_file_note)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("plan", "wrap")
        }

    def require_image_file(self) -> None:
        """Refuse a method whose result image tools cannot load.

        Raises:
            ValueError: saying why, and what to use instead.
        """
        if self.image_file is None:
            raise ValueError(
                f"method {self.name!r} trains no image LoRA: {self.image_file_note}. "
                "`cntlora methods` lists those that do; for comparison runs of other models use "
                "cntlora_core.methods.initialize_adapter"
            )
