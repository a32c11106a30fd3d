"""Second moments of data that several processes of torch.distributed have read in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from cntlora_core.activations.capture import PartialMoments
from cntlora_core.activations.moments import SecondMoment
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.runtime.processes import Processes


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
