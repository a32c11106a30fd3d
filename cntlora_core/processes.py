"""Many processes that each read a part of the data: they agree, add up, and fail together.

Everything here is a collective call: all processes of the default group of torch.distributed make
it, in the same order. With one process it does nothing but pass values through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cntlora_core.attachment import AttachmentPoint
from cntlora_core.capture import PartialMoments
from cntlora_core.factorization import Factors
from cntlora_core.moments import SecondMoment
from cntlora_core.plan import AdapterPlan

Value = TypeVar("Value")


class Processes:
    """The processes that compute one start together.

    Args:
        joined: Whether to work with the other processes of torch.distributed's default group, where
            one is initialised; False for a process that works by itself.
    """

    def __init__(self, joined: bool = True) -> None:
        active = joined and dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if active else 1
        self.rank = dist.get_rank() if active else 0

    @property
    def together(self) -> bool:
        return self.count > 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The small picklable values of all processes, by rank, on every process."""
        if not self.together:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def run(self, work: Callable[[], Value], doing: str) -> Value:
        """Do some work on every process, and raise on all of them if it fails on any.

        Args:
            work: Must make no collective call.
            doing: What it is, for the others' message.

        Raises:
            Exception: what ``work`` raised here; RuntimeError if it failed on another process.
        """
        result, error = attempt(work)
        self.raise_together(error, doing)
        return result  # pyright: ignore[reportReturnType]

    def raise_together(self, error: Exception | None, doing: str) -> None:
        """Raise ``error`` where it happened, and a RuntimeError that quotes it everywhere else."""
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(
                    f"process {rank} failed while {doing}, and process {self.rank} stops with it: "
                    f"{message}"
                )

    def require_same(self, value: str, what: str) -> None:
        """Refuse to go on where the processes were given different things.

        Raises:
            ValueError: on every process.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"process {rank} was given another {what} than process 0: {other[:300]} "
                    f"against {values[0][:300]}"
                )

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place where the tensor is where the group can reach it."""
        there = tensor.to(self._device()).contiguous()
        dist.all_reduce(there)
        return there.to(tensor.device)

    def from_first(self, tensor: Tensor | None, shape: Sequence[int]) -> Tensor:
        """A float32 tensor of the first process, on the CPU of every process."""
        if tensor is None:
            tensor = torch.empty(*shape)
        there = tensor.to(self._device(), torch.float32).contiguous()
        dist.broadcast(there, 0)
        return there.cpu()

    def _device(self) -> torch.device:
        if "nccl" in dist.get_backend():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def attempt(work: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    """The result of some work, or the error that it ended with."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def sum_partial_moments(
    points: Sequence[AttachmentPoint], partial: PartialMoments, processes: Processes
) -> PartialMoments:
    """Add up what all processes have read; every one ends with the same sums.

    Points share a sum where they share it on every process that called one of them: a process that
    has read nothing has no say. Where the processes differ, a sum that two points share on this one
    counts for both.

    Args:
        points: The same on every process.
        partial: Running sums of this process; taken over.
        processes: The group.
    """
    if not processes.together:
        return partial
    counts = {leader: fitter.count for leader, fitter in partial.sums.items()}
    wide = any(
        fitter.total is not None and fitter.total.dtype == torch.float64
        for fitter in partial.sums.values()
    )
    seen = processes.gather((partial.leaders, counts, wide))
    leaders = common_leaders([p.name for p in points], [own for own, _, _ in seen])
    dtype = torch.float64 if any(wide for _, _, wide in seen) else torch.float32
    widths = {p.name: p.in_features for p in points}
    own_leader = {name: partial.leaders.get(name, "") for name in dict.fromkeys(leaders.values())}
    uses = Counter(own_leader.values())
    sums: dict[str, SecondMoment] = {}
    for name, own in own_leader.items():
        count = sum(counts_there.get(there.get(name, ""), 0) for there, counts_there, _ in seen)
        if count == 0:
            continue
        uses[own] -= 1
        total = partial.sums[own].total if own in partial.sums else None
        if total is None:
            total = torch.zeros(widths[name], widths[name])
        # In place, unless another of the groups has the same sum to give.
        total = total.to(dtype, copy=uses[own] > 0)
        sums[name] = SecondMoment(widths[name])
        probed = (partial.sums[own] if own in partial.sums else sums[name]).probed.clone()
        sums[name].add(processes.add_up(total), count, processes.add_up(probed))
    return PartialMoments(leaders, sums)


def common_leaders(names: Sequence[str], by_process: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The coarsest sharing that is right on every process.

    Args:
        names: All points, in order.
        by_process: For each process, the leader of each point that was called there.

    Returns:
        The leader of each point that was called anywhere: the first, in order, of those that share
        its leader on every process.
    """
    leaders: dict[str, str] = {}
    first: dict[tuple[str | None, ...], str] = {}
    for name in names:
        key = tuple(own.get(name) for own in by_process)
        if any(leader is not None for leader in key):
            leaders[name] = first.setdefault(key, name)
    return leaders


def plan_from_first(make: Callable[[], AdapterPlan], processes: Processes) -> AdapterPlan:
    """Make a plan on the first process and hand it to all, so that all start bit for bit alike.

    Raises:
        Exception: what ``make`` raised, on the first process; RuntimeError on the others.
    """
    if not processes.together:
        return make()
    plan, error = attempt(make) if processes.first else (None, None)
    processes.raise_together(error, "solving for the start")
    header = plan and (
        plan.rewrites_base,
        plan.solver_error,
        [(n, f.down.shape, f.up.shape, f.scaling, f.filled) for n, f in plan.factors.items()],
    )
    header = processes.gather(header)[0]
    assert header is not None
    rewrites_base, solver_error, described = header
    factors = {}
    for name, down_shape, up_shape, scaling, filled in described:
        own = plan.factors[name] if plan is not None else None
        down = processes.from_first(own.down if own else None, down_shape)
        up = processes.from_first(own.up if own else None, up_shape)
        factors[name] = Factors(down, up, scaling, filled)
    return AdapterPlan(factors, rewrites_base, solver_error)
