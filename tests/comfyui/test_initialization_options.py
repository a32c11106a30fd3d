"""The rare settings of the initialisation: in a node of their own, and in graphs of before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from .conftest import Pack, defaults

# A graph that was saved before holds the values of these, in this order, and the API all of them.
BEFORE = (
    "method", "rank", "alpha", "train_text_encoder", "rank_budget", "split", "shift", "shift_kind",
    "factorization", "subspace", "damping", "preserve_output", "min_rank", "rho", "passes",
    "start_seed", "adapter", "convolutions", "orthogonality", "unit", "solver", "from_lora",
)  # fmt: skip
CHANGED = {"rank_budget": "fixed", "unit": "mean", "damping": 0.5}


@pytest.fixture(scope="module")
def from_before(pack: Pack, run: SimpleNamespace) -> Any:
    """What the node answers to a call of before, with values that are not the defaults."""
    values = defaults(pack.nodes["CNTLoRAInitialize"])
    given = {name: values[name] for name in BEFORE} | CHANGED | {"rank": 4}
    return pack.run("CNTLoRAInitialize", model=run.model, subject=run.subject.args[0], **given).args


def test_the_values_of_a_saved_graph_fall_into_the_same_widgets(pack: Pack) -> None:
    inputs = pack.nodes["CNTLoRAInitialize"].GET_SCHEMA().inputs
    widgets = [i for i in sorted(inputs, key=lambda i: bool(i.optional)) if hasattr(i, "default")]
    assert tuple(widget.id for widget in widgets) == BEFORE
    shown = pack.nodes["CNTLoRAInitializationOptions"].GET_SCHEMA().inputs
    hidden = {widget.id: widget for widget in widgets if (widget.extra_dict or {}).get("hidden")}
    assert hidden.keys() == {widget.id for widget in shown}
    assert all(hidden[widget.id].default == widget.default for widget in shown)


def test_the_values_of_before_count_and_are_named(run: SimpleNamespace, from_before: Any) -> None:
    assert set(from_before[0].initialization.plan.ranks.values()) == {4}
    assert "saved with unit=mean, damping=0.5, rank_budget=fixed" in from_before[2]
    assert len(set(run.initialized.args[0].initialization.plan.ranks.values())) > 1
    assert "saved with" not in run.initialized.args[2]


def test_the_node_of_their_own_says_the_same_and_takes_their_place(
    pack: Pack, run: SimpleNamespace, from_before: Any
) -> None:
    given = {"model": run.model, "subject": run.subject.args[0], "rank": 4}
    options = pack.run("CNTLoRAInitializationOptions", **CHANGED).args[0]
    start, _, report = pack.run("CNTLoRAInitialize", options=options, split=0.9, **given).args
    assert start.initialization.adapter == from_before[0].initialization.adapter
    assert "saved with" not in report
