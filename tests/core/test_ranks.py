"""The shared budget: what every allocation must satisfy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.closed_form.ranks import RankOffer, allocate_ranks


@st.composite
def problems(draw):
    n = draw(st.integers(1, 6))
    ceiling = draw(st.integers(1, 12))
    offers = {}
    for i in range(n):
        values = draw(st.lists(st.floats(0, 100), min_size=0, max_size=12))
        offers[f"p{i}"] = RankOffer(
            torch.tensor(sorted(values, reverse=True)),
            draw(st.integers(1, 5)),
            draw(st.integers(1, 15)),
        )
    floor = sum(offer.cost for offer in offers.values())
    return offers, draw(st.integers(floor, floor + 80)), ceiling


@given(problems())
@settings(max_examples=200, deadline=None)
def test_ranks_meet_the_budget_and_stop_only_when_nothing_fits(problem):
    offers, budget, ceiling = problem
    ranks = allocate_ranks(offers, budget=budget, min_rank=1, ceiling=ceiling)
    spent = sum(ranks[n] * offers[n].cost for n in offers)
    assert spent <= budget
    for name, offer in offers.items():
        assert 1 <= ranks[name] <= max(1, min(ceiling, offer.max_rank))
        if ranks[name] < min(ceiling, offer.max_rank):
            assert budget - spent < offer.cost


def test_the_best_directions_are_taken_first():
    offers = {
        "steep": RankOffer(torch.tensor([10.0, 1.0, 0.1]), 1, 8),
        "flat": RankOffer(torch.tensor([1.0, 1.0, 1.0]), 1, 8),
    }
    # Shares of each point's own energy: steep .990 .0099 .0001, flat .333 .333 .333
    assert allocate_ranks(offers, budget=4, ceiling=8) == {"steep": 1, "flat": 3}
    assert allocate_ranks(offers, budget=5, ceiling=8) == {"steep": 2, "flat": 3}


def test_a_budget_below_the_floor_is_refused():
    offers = {f"p{i}": RankOffer(torch.ones(4), 1, 8) for i in range(3)}
    with pytest.raises(ValueError, match="short by 3"):
        allocate_ranks(offers, budget=3, min_rank=2, ceiling=8)
