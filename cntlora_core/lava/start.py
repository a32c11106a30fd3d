"""Base model + data -> model with LAVA adapters that start from the data."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from cntlora_core.activations.capture import ForwardFn
from cntlora_core.activations.collection import ProgressFn, collect_moments
from cntlora_core.activations.token_masks import MaskFn
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.across_processes import plan_from_first
from cntlora_core.initialization.plan import AdapterPlan, check_points, plan_adapter
from cntlora_core.initialization.report import InitReport, report_of
from cntlora_core.lava.closed_form import closed_form_points, lava_plan
from cntlora_core.lava.config import LavaConfig
from cntlora_core.lava.factors import LavaPlan
from cntlora_core.lava.inject import adaptable_modules, inject_lava
from cntlora_core.lava.model import rank_and_alpha
from cntlora_core.layers.weights import check_rewritable
from cntlora_core.runtime.processes import Processes


@dataclass(frozen=True)
class LavaReport:
    """What a start did.

    Attributes:
        start: The closed form's own report; None where every module starts plain.
        errors: By convolution: error of its terms against the closed form's delta, relative.
        relative_error: The same of all deltas together, matrices (which have none) included.
        plain: By module that started plain: why.
    """

    start: InitReport | None
    errors: dict[str, float]
    relative_error: float
    plain: dict[str, str]

    @property
    def rounding(self) -> float:
        """The most that a rewritten weight lost by rounding; see :class:`InitReport`."""
        return self.start.rounding if self.start else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"start": self.start.to_dict() if self.start else None}

    def summary(self) -> str:
        """One sentence for a person."""
        parts = [self.start.summary()] if self.start else []
        if self.errors:
            low, high = min(self.errors.values()), max(self.errors.values())
            parts.append(
                f"the terms of {len(self.errors)} convolutions miss {low:.0%} to {high:.0%} of "
                f"their deltas (all together {self.relative_error:.0%})"
            )
        if self.plain:
            name, why = next(iter(self.plain.items()))
            parts.append(f"{len(self.plain)} modules start plain, for example {name!r}: {why}")
        return "; ".join(parts) or "a plain start"


def lava_report(plan: LavaPlan, start: InitReport | None, plain: Mapping[str, str]) -> LavaReport:
    """The report on a plan."""
    errors = {n: f.error for n, f in plan.factors.items() if f.size and len(f.spatial)}
    return LavaReport(start, errors, plan.relative_error, dict(plain))


def get_lava_model(
    model: nn.Module,
    lava_config: LavaConfig,
    cntlora_config: CNTLoRAConfig | None,
    dataloader: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    progress: ProgressFn | None = None,
    sum_across_processes: bool = True,
) -> PeftModel:
    """Wrap a base model with LAVA adapters that start from CNTLoRA's closed form.

    As :func:`cntlora_core.get_cntlora_model`; each delta is carried into LAVA's factors, which is
    exact for matrices and an approximation for convolutions, whose error is reported. Modules that
    have no closed form (convolutions in groups or in one dimension, or wider than
    ``max_unfolded_width``) start plain. With ``preserve_output`` the frozen weights are rewritten:
    save the trained adapter with :func:`cntlora_core.save_converted`.

    Args:
        model: The base model; its targeted modules are wrapped in place.
        lava_config: The adapter's settings.
        cntlora_config: The start's settings; None for the defaults. ``split`` is followed where
            the orthogonality term does not act on U.
        dataloader: Batches of the data to adapt to; any iterable.
        forward_fn: See :func:`cntlora_core.get_cntlora_model`, like all that is not named here.
        mask_fn: See there.
        progress: See there.
        sum_across_processes: See there.

    Returns:
        A :class:`peft.PeftModel`; its ``lava_report`` is a :class:`LavaReport`, its ``lava_plans``
        hold the :class:`LavaPlan` of each adapter.

    Raises:
        ValueError, TypeError, FloatingPointError: as there.
    """
    config = cntlora_config or CNTLoRAConfig()
    if config.rank_budget == "parameters":
        raise ValueError(
            "rank_budget='parameters' counts a LoRA's parameters, of which LAVA has fewer: use "
            "rank_budget='ranks' or 'fixed'"
        )
    processes = Processes(sum_across_processes)

    def prepare() -> _Task:
        return _Task(model, lava_config, config)

    task = processes.run(prepare, "preparing the start")
    processes.require_same(task.settings(), "configuration")
    began = time.perf_counter()
    start, closed_form = None, AdapterPlan({}, config.preserve_output)
    if task.points:
        captured = collect_moments(
            model,
            task.points,
            dataloader,
            forward_fn=forward_fn,
            mask_fn=mask_fn,
            progress=progress,
            processes=processes,
        )
        middle = time.perf_counter()
        closed_form = plan_from_first(
            lambda: plan_adapter(
                task.points, captured, config, rank=task.wanted(), scaling=task.scalings
            ),
            processes,
        )
        end = time.perf_counter()
        start = report_of(closed_form, captured, config, middle - began, end - middle)
        start = dataclasses.replace(start, processes=processes.count)
    plan = task.carry(closed_form)
    wrapped, rounding = processes.run(
        lambda: inject_lava(model, lava_config, plan, method=config.constraint),
        "wrapping the model",
    )
    if start is not None:
        start = dataclasses.replace(start, rounding=max(rounding.values(), default=0.0))
    object.__setattr__(wrapped, "lava_plans", {"default": plan})
    object.__setattr__(wrapped, "lava_report", lava_report(plan, start, task.plain))
    return wrapped


class _Task:
    """What is to be solved: checked when it is made, before any forward pass."""

    def __init__(self, model: nn.Module, lava_config: LavaConfig, config: CNTLoRAConfig) -> None:
        self.lava_config, self.config = lava_config, config
        self.modules = adaptable_modules(model, lava_config)
        self.points, self.plain = closed_form_points(self.modules, config)
        found = {name: rank_and_alpha(lava_config, name) for name in self.modules}
        self.ranks = {name: rank for name, (rank, _) in found.items()}
        self.scalings = {name: alpha / rank for name, (rank, alpha) in found.items()}
        if self.points:
            check_points(self.points, config, self.wanted())
        if config.preserve_output:
            check_rewritable(model, {p.name: p.module for p in self.points})

    def wanted(self) -> dict[str, int]:
        """Ranks of the closed form; a narrow module's delta has fewer than LAVA has terms."""
        fixed = self.config.rank_budget == "fixed"
        return {
            p.name: min(self.ranks[p.name], p.max_rank) if fixed else self.ranks[p.name]
            for p in self.points
        }

    def settings(self) -> str:
        """What must be alike on all processes."""
        values = [self.config.describe(), self.ranks, self.scalings]
        return json.dumps(values, sort_keys=True)

    def carry(self, closed_form: AdapterPlan) -> LavaPlan:
        shared = self.config.rank_budget != "fixed"
        return lava_plan(
            self.modules,
            closed_form,
            self.lava_config,
            ranks=self.ranks | (closed_form.ranks if shared else {}),
            scalings=self.scalings,
            split=self.config.split,
            seed=self.config.seed,
        )
