"""Variable adapter structure: one global budget of ranks, shared out by the deltas' spectra."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RankOffer:
    """What one attachment point bids.

    Attributes:
        values: (k,) singular values of its delta, descending.
        cost: What one rank costs: 1, or ``d_in + d_out`` in a budget of parameters.
        max_rank: The most ranks that it can take.
    """

    values: Tensor
    cost: int
    max_rank: int


def allocate_ranks(
    offers: Mapping[str, RankOffer], *, budget: int, min_rank: int = 1, ceiling: int
) -> dict[str, int]:
    """Share a budget out: best directions first, until nothing that is left can be paid for.

    Each point offers its directions as fractions of its own energy, ``S_j^2 / sum(S^2)``. Points
    whose delta has fewer directions than the ceiling go on offering, at nothing, so that a budget
    is spent while anybody can take more.

    Returns:
        The rank of each point, between ``min(min_rank, max_rank)`` and ``min(ceiling, max_rank)``.

    Raises:
        ValueError: if the budget does not pay for the floor.
    """
    ranks = {name: min(min_rank, offer.max_rank) for name, offer in offers.items()}
    left = budget - sum(ranks[name] * offer.cost for name, offer in offers.items())
    if left < 0:
        raise ValueError(
            f"a budget of {budget} does not pay for min_rank={min_rank} at {len(offers)} "
            f"attachment points (short by {-left}); raise the rank or lower min_rank"
        )
    energies = {name: _fractions(offer.values) for name, offer in offers.items()}
    order = {name: i for i, name in enumerate(offers)}
    heap: list[tuple[float, int, int, str]] = []

    def offer_next(name: str) -> None:
        rank, offer = ranks[name], offers[name]
        if rank < min(ceiling, offer.max_rank):
            gain = energies[name][rank] if rank < len(energies[name]) else 0.0
            heapq.heappush(heap, (-gain, rank, order[name], name))

    for name in offers:
        offer_next(name)
    while heap and left > 0:
        _, _, _, name = heapq.heappop(heap)
        if offers[name].cost > left:
            continue
        ranks[name] += 1
        left -= offers[name].cost
        offer_next(name)
    return ranks


def _fractions(values: Tensor) -> list[float]:
    energy = values.double().square()
    total = energy.sum()
    return (energy / total).tolist() if total > 0 else []
