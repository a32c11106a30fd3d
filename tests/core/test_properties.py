"""What holds of an initialisation whatever the data: by hooks, moments, spectrum and factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cntlora_core.activations.collection import collect_moments
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.plan import plan_adapter
from cntlora_core.layers.attachment import attachment_point

few = settings(max_examples=12, deadline=None)
configs = st.sampled_from(
    [
        CNTLoRAConfig(constraint=c, rank_budget="fixed", **options)
        for c in ("cross", "self", "shift")
        for options in ({}, {"subspace": "full"}, {"factorization": "qr"}, {"unit": "mean"})
    ]
)
seeds = st.integers(0, 10_000)


def rows_of(n: int, d: int, seed: int) -> torch.Tensor:
    """Rows whose second moment has well separated eigenvalues, in no special directions."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return torch.randn(n, d, generator=generator) * 2.0 ** -torch.arange(d) @ turn


def linear(d_in: int, d_out: int, seed: int) -> nn.Linear:
    module = nn.Linear(d_in, d_out)
    generator = torch.Generator().manual_seed(seed + 1)
    module.weight.data = torch.randn(d_out, d_in, generator=generator)
    return module


def initialize(module: nn.Linear, batches, config, rank: int) -> Factors:
    point = attachment_point("layer", module)
    captured = collect_moments(module, [point], batches)
    return plan_adapter([point], captured, config, rank=rank, scaling=2.0).factors["layer"]


@few
@given(seed=seeds, config=configs, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_order_and_batch_split_do_not_matter(seed, config, cuts):
    rows, module = rows_of(40, 5, seed), linear(5, 4, seed)
    whole = initialize(module, [rows], config, 3).delta()
    shuffled = rows[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
    split = list(torch.tensor_split(shuffled, sorted(cuts)))
    torch.testing.assert_close(
        initialize(module, split, config, 3).delta(),
        whole,
        rtol=1e-3,
        atol=1e-3 * float(whole.norm()),
    )


@few
@given(seed=seeds, config=configs)
def test_permuting_features_permutes_the_delta(seed, config):
    rows, module, other = rows_of(40, 5, seed), linear(5, 4, seed), linear(5, 4, seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    other.weight.data = module.weight.data[:, order]
    delta = initialize(module, [rows], config, 3).delta()[:, order]
    torch.testing.assert_close(
        initialize(other, [rows[:, order]], config, 3).delta(),
        delta,
        rtol=1e-3,
        atol=1e-3 * float(delta.norm()),
    )


@few
@given(seed=seeds, config=configs, scale=st.sampled_from([1e-4, 0.03, 50.0, 1e4]))
def test_scaling_the_inputs_does_not_matter(seed, config, scale):
    rows, module = rows_of(40, 5, seed), linear(5, 4, seed)
    delta = initialize(module, [rows], config, 3).delta()
    torch.testing.assert_close(
        initialize(module, [rows * scale], config, 3).delta(),
        delta,
        rtol=1e-3,
        atol=1e-3 * float(delta.norm()),
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=seeds,
    config=configs,
    n=st.integers(0, 9),
    d_in=st.integers(2, 9),
    d_out=st.integers(2, 9),
    data=st.data(),
)
def test_any_shape_gives_a_finite_initialisation_that_fills_what_the_data_lacks(
    seed, config, n, d_in, d_out, data
):
    rank = data.draw(st.integers(1, min(d_in, d_out)))
    generator = torch.Generator().manual_seed(seed)
    rows, module = torch.randn(n, d_in, generator=generator), linear(d_in, d_out, seed)
    factors = initialize(module, [rows], config, rank)
    assert factors.down.shape == (rank, d_in)
    assert factors.up.shape == (d_out, rank)
    assert torch.isfinite(factors.delta()).all()
    supported = min(rank, n)
    # One direction alone can be left as it is: c h = 1 there.
    directions = n if config.subspace == "full" else supported
    least = config.unit == "least-change" and config.constraint != "shift"
    alone = least and directions == 1
    assert factors.filled == (rank if alone else rank - supported)
    own = rank - factors.filled
    assert torch.linalg.matrix_rank(factors.delta().double(), rtol=1e-6) == own
    assert factors.up[:, own:].abs().sum() == 0
    assert factors.down.norm(dim=1).min() > 0


@few
@given(seed=seeds, config=configs, value=st.sampled_from([0.0, 1e-3, 3.0]))
def test_constant_inputs_support_at_most_one_direction_and_zero_inputs_none(seed, config, value):
    row = rows_of(1, 5, seed) * value
    factors = initialize(linear(5, 4, seed), [row.expand(20, 5)], config, 3)
    unchanged = config.unit == "least-change" and config.constraint != "shift"
    assert factors.filled == (3 if value == 0 or unchanged else 2)
    off = factors.delta() - factors.delta() @ row.T @ row / row.square().sum().clamp_min(1e-30)
    assert off.norm() <= 1e-3 * factors.delta().norm()


@few
@given(seed=seeds, config=configs)
def test_duplicated_features_are_treated_alike_and_add_no_direction(seed, config):
    rows = rows_of(40, 3, seed)
    factors = initialize(linear(6, 5, seed), [torch.cat([rows, rows], dim=1)], config, 4)
    assert factors.filled == 1
    delta = factors.delta()
    torch.testing.assert_close(
        delta[:, :3], delta[:, 3:], rtol=1e-3, atol=1e-3 * float(delta.norm())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("constraint", ["cross", "self", "shift"])
def test_models_of_other_data_types_get_nearly_the_float32_initialisation(dtype, constraint):
    rows, module = rows_of(64, 4, 3), linear(4, 5, 3)
    config = CNTLoRAConfig(constraint=constraint, rank_budget="fixed")
    wanted = initialize(module, [rows], config, 2).delta()
    factors = initialize(module.to(dtype), [rows.to(dtype)], config, 2)
    assert factors.down.dtype == factors.up.dtype == torch.float32
    assert (factors.delta() - wanted).norm() < 0.05 * wanted.norm()


@few
@given(bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), where=st.integers(0, 2))
def test_non_finite_activations_name_the_point_and_the_batch(bad, where):
    batches = [rows_of(6, 4, i) for i in range(3)]
    batches[where][2, 1] = bad
    with pytest.raises(FloatingPointError, match=f"'layer' is not finite in batch {where}"):
        initialize(linear(4, 3, 0), batches, CNTLoRAConfig(), 2)
