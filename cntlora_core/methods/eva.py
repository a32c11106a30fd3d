"""EVA (arXiv 2410.07170) by peft's own code, fed so that it ends.

peft sums principal components up batch by batch and goes through the data again and again until
they stand still. A batch with fewer rows than components is skipped, so where a layer reads fewer
rows than that in *every* batch, it never ends: on Stable Diffusion 1.5 at rank 128 the 77 tokens of
a prompt and the 64 of the mid-block, one image a batch. And where batches are small and differ,
components move for long.

Here what the layers read is held back over a whole pass over the data, or as much of one as fits
into memory, and given to peft at once. A turn of its loop then sees what the turn before has seen,
and three are enough.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from cntlora_core.activations.capture import length_of
from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.methods.base import InitializationRequest, PlannedInitialization
from cntlora_core.methods.from_weights import require_rank
from cntlora_core.methods.rows import RowPasses, StandIn, repeatable, stand_in_names

NAME = "eva"


class NotConvergedError(ValueError):
    """EVA's components were still moving when its limit was reached."""


def plan_eva(request: InitializationRequest) -> PlannedInitialization:
    """Down matrices along the leading principal components of what each point reads; up zero.

    Ranks are shared out by explained variance; a point may get none, and then has no adapter.

    Raises:
        ValueError: without data, or for a rank above a point's input width.
        NotConvergedError: at the limit of passes or time, saying what to do.
    """
    require_rank(NAME, request, lambda point: point.in_features, "d_in")
    started = time.perf_counter()
    config, notes = _eva_config(request)
    feed = _Feed(request, round(request.rank * config.rho))
    lora_config = LoraConfig(
        r=request.rank, target_modules=list(feed.names.values()), init_lora_weights="eva",
        eva_config=config,
    )  # fmt: skip
    with feed.passes.hooked():
        components = get_eva_state_dict(
            feed.stand_ins,
            feed,
            lora_config,
            forward_fn=feed.step,
            prepare_model_inputs_fn=lambda _inputs, _config: None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    factors = {}
    for point in request.points:
        down = components[feed.names[point.name]].detach().to("cpu", torch.float32)
        rank = down.shape[0]
        if rank == 0:
            continue
        scaling = request.scaling
        if not config.adjust_scaling_factors:
            scaling *= request.rank / rank  # alpha stays, so alpha / rank does not
        factors[point.name] = Factors(
            down.clone(memory_format=torch.contiguous_format),
            torch.zeros(point.out_features, rank),
            scaling,
        )
    dropped = len(request.points) - len(factors)
    if dropped:
        notes.append(f"{dropped} attachment points got rank 0 and carry no adapter")
    notes.append(f"{feed.passes.batches_done} forward passes until the components stood still")
    plan = AdapterPlan(factors, rewrites_base=False)
    seconds = time.perf_counter() - started
    return PlannedInitialization(
        plan,
        InitializationReport(
            NAME, plan.ranks, feed.passes.seconds, seconds - feed.passes.seconds, notes=tuple(notes)
        ),
    )


def _eva_config(request: InitializationRequest) -> tuple[EvaConfig, list[str]]:
    """The user's settings, with no more components than the narrowest input has."""
    given = request.lora_config.eva_config if request.lora_config is not None else None
    config = copy.deepcopy(given) if given is not None else EvaConfig()
    if config.whiten:
        raise ValueError(
            "EvaConfig(whiten=True): peft divides the components that several layers share once "
            "for each of them; use whiten=False"
        )
    narrow = min(request.points, key=lambda point: point.in_features)
    rho = narrow.in_features / request.rank
    if rho >= config.rho:
        return config, []
    note = (
        f"EVA's rho was lowered from {config.rho:g} to {rho:g}: {narrow.name!r} reads only "
        f"{narrow.in_features} features"
    )
    config.rho = rho
    return config, [note]


class _Step:
    """One turn of peft's loop; which batches it takes is the feed's business."""

    def to(self, _device: Any) -> _Step:
        return self


class _Feed:
    """Stands in for model and dataloader, and gives every point enough rows at a time.

    Attributes:
        stand_ins: What peft hooks.
        names: By point, the name of its stand-in.
        passes: The forward passes.
    """

    def __init__(self, request: InitializationRequest, components: int) -> None:
        self._request, self._components = request, components
        self._batches = repeatable(request.batches, NAME)
        self.passes = RowPasses(request, self._see)
        self.names = stand_in_names(request.points)
        device = next(request.model.parameters()).device
        # EVA reads no weight: one number each says where to compute.
        self.stand_ins = nn.ModuleDict(
            {name: StandIn(torch.zeros(1, 1, device=device)) for name in self.names.values()}
        )
        self._held: dict[str, list[Tensor]] = {point.name: [] for point in request.points}
        self._copied: tuple[Tensor, int, Tensor] | None = None
        self._stream = self._endless()
        self._batches_in_a_pass = length_of(self._batches)
        self._passes_done = 0
        self._started = time.perf_counter()

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[_Step]:
        yield _Step()

    def step(self, _model: nn.Module, _step: _Step) -> None:
        """A pass over the data, or less of it where memory is short and every point has enough."""
        waiting = set(self.names)
        done = 0
        while waiting:
            self.passes.run(next(self._stream))
            self._copied = None
            done += 1
            whole = self._batches_in_a_pass and done >= self._batches_in_a_pass
            if whole or self._held_bytes() > self._request.limits.held_bytes:
                waiting -= self._feed()
            self._check_limits()
            if self._request.passes_progress is not None:
                self._request.passes_progress(self._settled(), len(self.names))

    def _see(self, name: str, rows: Tensor) -> None:
        self._held[name].append(self._copy(rows))

    def _copy(self, rows: Tensor) -> Tensor:
        """A copy of what a point reads, one for points that read the same tensor in turn."""
        version = 0 if rows.is_inference() else rows._version
        if self._copied is not None:
            seen, seen_version, copy_of_seen = self._copied
            if (rows.data_ptr(), rows.shape, rows.stride(), version) == (
                (seen.data_ptr(), seen.shape, seen.stride(), seen_version)
            ):
                return copy_of_seen
        made = rows.clone()
        self._copied = (rows, version, made)  # kept alive, so that its memory is not reused
        return made

    def _held_bytes(self) -> int:
        parts = {part.data_ptr(): part for held in self._held.values() for part in held}
        return sum(part.numel() * part.element_size() for part in parts.values())

    def _feed(self) -> set[str]:
        """Give peft what is held of each point that has enough of it; returns which were."""
        fed = set()
        started = time.perf_counter()
        for name, held in self._held.items():
            if sum(len(part) for part in held) >= self._components:
                self.stand_ins[self.names[name]](torch.cat(held) if len(held) > 1 else held[0])
                held.clear()
                fed.add(name)
        self.passes.sink_seconds += time.perf_counter() - started
        return fed

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self._batches
            self._batches_in_a_pass = self._batches_in_a_pass or self.passes.batches_done
            self._passes_done += 1
            self.passes.require_rows(NAME)

    def _settled(self) -> int:
        """Points whose components stand still: peft has taken its hook off."""
        return sum(not self.stand_ins[name]._forward_hooks for name in self.names.values())

    def _check_limits(self) -> None:
        limits = self._request.limits
        seconds = time.perf_counter() - self._started
        late = limits.max_seconds is not None and seconds > limits.max_seconds
        total = length_of(self._batches)
        passes = self.passes.batches_done / total if total else float(self._passes_done)
        if not late and passes <= limits.max_passes:
            return
        moving = [
            n for n, stand_in in self.names.items() if self.stand_ins[stand_in]._forward_hooks
        ]
        raise NotConvergedError(
            f"EVA has not converged after {passes:.1f} passes over the data and {seconds:.0f} s: "
            f"the components of {len(moving)} inputs still move, for example that of "
            f"{moving[0]!r}. Allow more (max_passes is {limits.max_passes}, max_seconds "
            f"{limits.max_seconds}), ask for less (a lower rank, EvaConfig with a lower rho or "
            "tau), or give more and more varied data"
        )
