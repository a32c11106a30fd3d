"""The way in for any model: a base model and a method's name to a model that trains."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from cntlora_core.activations.capture import ForwardFn
from cntlora_core.activations.collection import ProgressFn
from cntlora_core.activations.token_masks import MaskFn
from cntlora_core.adapter.inject import AdapterPlan, check_lora_config, inject_adapter
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.layers.attachment import find_attachment_points
from cntlora_core.methods.base import InitializationRequest, Limits, Method, WrappedModel
from cntlora_core.methods.from_weights import seeded
from cntlora_core.methods.peft_model import check_not_distributed
from cntlora_core.methods.registry import get_method
from cntlora_core.saving.conversion import save_converted

_INITS = {"corda_ipm": "corda", "corda_kpm": "corda", "lora_gaussian": "gaussian"}
_INITS |= {"lora_orthogonal": "orthogonal"}


@dataclass(frozen=True)
class InitializedAdapter:
    """A model that is ready to be trained.

    Attributes:
        model: A :class:`peft.PeftModel`; for full fine-tuning the base model itself.
        method: What it was initialised by.
        report: What that did, and how long it took.
        plan: The initial factors of every attachment point, in float32, with the scaling; with
            ``plan.rewrites_base`` they are what a file for the stock base has to subtract. None for
            methods that are no plain LoRA.
    """

    model: nn.Module
    method: Method
    report: InitializationReport
    plan: AdapterPlan | None
    _after_step: Callable[[int], None] | None = field(default=None, repr=False)

    def after_step(self, step: int) -> None:
        """What a method does between two steps: AdaLoRA prunes; all others do nothing.

        To be called after the optimizer's step and before the gradients are cleared.

        Args:
            step: How many steps are done, from 1.
        """
        if self._after_step is not None:
            self._after_step(step)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save what was trained in peft's layout, right on the stock base model.

        As :func:`cntlora_core.save_converted`: where the base weight was rewritten, the initial
        adapter is subtracted, which doubles the ranks.

        Raises:
            ValueError: for full fine-tuning and BitFit, which have no adapter, and for LoftQ, whose
                adapter fits the quantised base only.
        """
        model = self.model
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"{self.method.name!r} leaves no adapter: save the model itself, by its "
                "save_pretrained or its state_dict"
            )
        if self.method.name == "loftq":
            raise ValueError(
                "a LoftQ adapter belongs to its quantised base, not to the stock one: save both, "
                "by model.save_pretrained and model.get_base_model()"
            )
        if self.plan is None or not self.plan.rewrites_base:
            model.save_pretrained(str(folder))
            return
        save_converted(model, folder)


def initialize_adapter(
    model: nn.Module,
    lora_config: LoraConfig,
    method: str | Method,
    dataloader: Iterable[Any] | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    loss_fn: ForwardFn | None = None,
    cntlora_config: CNTLoRAConfig | None = None,
    steps: int | None = None,
    seed: int = 0,
    limits: Limits | None = None,
    progress: ProgressFn | None = None,
) -> InitializedAdapter:
    """Make any model ready to be trained, by any method of the registry.

    Args:
        model: The base model, unwrapped; its targeted modules are wrapped in place.
        lora_config: peft's configuration: rank, alpha, target modules and so on; the method writes
            ``init_lora_weights`` and the patterns. Its ``eva_config``, ``lora_ga_config`` and so
            on are used by the methods they belong to.
        method: A name of the registry (``cntlora methods`` lists them), or a record of it.
        dataloader: Batches of the data to adapt to, for methods that read some; any iterable.
        forward_fn: ``forward_fn(model, batch)`` runs one forward pass; by default as
            :func:`~cntlora_core.methods.peft_model.default_forward` does.
        mask_fn: Which tokens count, in every method that reads activations: see
            :meth:`~cntlora_core.activations.token_masks.TokenMasks.begin`.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar loss, for LoRA-GA; by default the
            ``.loss`` of what ``forward_fn`` returns.
        cntlora_config: Settings of CNTLoRA's own variants; the constraint is the method's.
        steps: How many training steps will follow; AdaLoRA needs to know.
        seed: Seed of all that is random in the initialisation; the global generator is left as it
            was.
        limits: When to give EVA's iteration up.
        progress: Called with (done, total or 0) during the passes over the data.

    Raises:
        ValueError: for a method that does not exist or cannot run here, data that is missing, a
            rank that a method cannot give, or settings that contradict the method; in words.

    Example:
        >>> initialized = initialize_adapter(base, LoraConfig(r=8, target_modules="all-linear"),
        "eva", data)
        >>> train(initialized.model)
        >>> initialized.save_pretrained("adapter")
    """
    chosen = get_method(method) if isinstance(method, str) else method
    check_not_distributed(model)
    _check(chosen, lora_config, dataloader, cntlora_config)
    root = lora_config.r**0.5 if lora_config.use_rslora else lora_config.r
    points = find_attachment_points(model, lora_config) if chosen.peft_type else []
    request = InitializationRequest(
        model=model,
        points=points,
        rank=lora_config.r,
        scaling=lora_config.lora_alpha / root,
        batches=dataloader,
        forward_fn=forward_fn,
        mask_fn=mask_fn,
        loss_fn=loss_fn,
        lora_config=lora_config,
        cntlora_config=cntlora_config,
        steps=steps,
        seed=seed,
        limits=limits or Limits(),
        passes_progress=progress,
    )
    with seeded(seed):
        wrapped = _initialize(chosen, model, lora_config, request)
    return InitializedAdapter(
        wrapped.model, chosen, wrapped.report, wrapped.plan, wrapped.after_step
    )


def _initialize(
    method: Method, model: nn.Module, lora_config: LoraConfig, request: InitializationRequest
) -> WrappedModel:
    if method.wrap is not None:
        return method.wrap(model, lora_config, request)
    assert method.plan is not None
    planned = method.plan(request)
    peft_model, rounding = inject_adapter(
        model, _without_initialization(lora_config), planned.plan, method=method.name
    )
    report = dataclasses.replace(planned.report, rounding=max(rounding.values(), default=0.0))
    return WrappedModel(peft_model, report, planned.plan)


def _check(
    method: Method,
    lora_config: LoraConfig,
    dataloader: Iterable[Any] | None,
    cntlora_config: CNTLoRAConfig | None,
) -> None:
    if method.needs != "nothing" and dataloader is None:
        raise ValueError(
            f"method {method.name!r} reads {method.needs}: give a dataloader with the data to "
            "adapt to"
        )
    if cntlora_config is not None and method.family != "cntlora":
        raise ValueError(
            f"cntlora_config has no effect on method {method.name!r}: leave it out, or use cross, "
            "self or shift"
        )
    own = {True, False, _INITS.get(method.name, method.name)}
    if lora_config.init_lora_weights not in own:
        raise ValueError(
            f"init_lora_weights={lora_config.init_lora_weights!r} and method={method.name!r} "
            "disagree: leave init_lora_weights out, the method decides"
        )
    if lora_config.use_dora and method.name != "dora":
        raise ValueError(
            f"use_dora=True has an initialisation of its own, which method {method.name!r} would "
            "overwrite: use method='dora', or leave it out"
        )
    if method.family == "peft" and (lora_config.rank_pattern or lora_config.alpha_pattern):
        raise ValueError(
            f"method {method.name!r} takes one rank and alpha for all layers: leave rank_pattern "
            "and alpha_pattern out"
        )
    check_lora_config(lora_config, rewrites_base=False)


def _without_initialization(lora_config: LoraConfig) -> LoraConfig:
    """Without the settings of a finished initialisation: loading the adapter must not repeat it."""
    plain = copy.deepcopy(lora_config)
    plain.init_lora_weights = True
    plain.eva_config = plain.corda_config = plain.lora_ga_config = None
    plain.loftq_config = {}
    return plain
