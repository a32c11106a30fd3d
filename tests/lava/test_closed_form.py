"""The data-driven initialisation of LAVA."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from cntlora_core import CNTLoRAConfig, get_cntlora_model
from cntlora_core.adapter.inject import adapter_layers
from cntlora_core.lava import OrthogonalityLoss, get_lava_model, orthogonality_loss
from cntlora_core.lava.conversion import brought_back
from cntlora_core.lava.factors import LavaFactors, difference
from cntlora_core.lava.inject import lava_layers, snapshot
from cntlora_core.saving.conversion import save_converted

from .conftest import config, layers

WITH_CLOSED_FORM = ["first", "short", "turned", "head"]


def data(count=3):
    return [
        torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)
    ]


def deltas(model):
    return {
        n: layer.get_delta_weight("default").detach() for n, layer in lava_layers(model).items()
    }


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_matrices_get_the_closed_form_exactly_and_convolutions_nearly(net, strength):
    from peft import LoraConfig

    settings = CNTLoRAConfig(preserve_output=False, rank_budget="fixed")
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=WITH_CLOSED_FORM)
    exact_model = get_cntlora_model(copy.deepcopy(net), lora, settings, data())
    model = get_lava_model(net, config(orthogonality=strength), settings, data())
    found, report = deltas(model), model.lava_report
    for name, layer in adapter_layers(exact_model).items():
        exact = layer.get_delta_weight("default").detach()
        error = float((found[name] - exact).norm() / exact.norm())
        if name == "first":
            assert 0.01 < error < 0.999
        else:  # the 1 x 1 convolution among them
            assert error < 1e-4
        assert report.errors.get(name, 0.0) == pytest.approx(error, abs=1e-4)
    assert set(report.plain) == {"second", "line"}
    assert not found["second"].any()
    assert "a convolution in 2 groups" in report.summary()
    first = orthogonality_loss(model)
    assert first < 1e-8 if strength else first == 0
    for layer in lava_layers(model).values():
        u = layer.lava_U["default"]
        if strength:
            torch.testing.assert_close(u.T @ u, torch.eye(3), rtol=0, atol=1e-4)


def test_the_first_output_is_the_base_s(net, x):
    before, weight = net(x), net.first.weight.detach().clone()
    model = get_lava_model(net, config(), None, data())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert (net.first.base_layer.weight - weight).abs().max() > 1e-3
    assert model.lava_report.rounding < 1e-6


def train(model, x):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(4):
        (model(x).square().sum() + orthogonality_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_trained_adapter_is_saved_for_the_stock_base(net, make_net, x, tmp_path):
    model = get_lava_model(net, config(), None, data())
    train(model, x)
    exact = save_converted(model, tmp_path / "exact")
    assert exact.relative_error == 0
    for name, rank in exact.trained_ranks.items():
        assert exact.ranks[name] == (rank if name in ("second", "line") else 2 * rank)
    loaded = PeftModel.from_pretrained(make_net(), tmp_path / "exact")
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-3, atol=1e-4)
    small = save_converted(model, tmp_path / "small", compress=True)
    assert small.ranks == small.trained_ranks
    stored = PeftModel.from_pretrained(make_net(), tmp_path / "small")
    wanted, got = deltas(loaded), deltas(stored)
    lost = sum((got[n] - d).norm() ** 2 for n, d in wanted.items())
    size = sum(d.norm() ** 2 for d in wanted.values())
    assert small.relative_error == pytest.approx(float((lost / size) ** 0.5), rel=1e-2)
    assert 0 < small.relative_error < 1


def test_too_wide_convolutions_are_initialised_plainly(net, x):
    before = net(x)
    settings = CNTLoRAConfig(max_unfolded_width=17, preserve_output=False, rank_budget="fixed")
    model = get_lava_model(net, config(target_modules=["first"]), settings, [])
    assert "18 unfolded features" in model.lava_report.plain["first"]
    assert torch.equal(model(x), before)
    assert model.lava_report.config is None


def test_ranks_above_what_the_data_supports_are_filled(net):
    settings = CNTLoRAConfig(rank_budget="fixed")
    two = [data()[0]]  # two rows at the head
    model = get_lava_model(net, config(target_modules=["head"]), settings, two)
    plan = model.lava_plans["default"]
    assert plan.filled == {"head": 1}
    u, v = plan.factors["head"].u, plan.factors["head"].v
    torch.testing.assert_close(u.T @ u, torch.eye(3), rtol=0, atol=1e-5)
    assert v[:, :2].any(dim=0).all()
    assert not v[:, 2:].any()


def test_the_term_leaves_an_initialisation_of_more_ranks_than_outputs_alone(net):
    settings = CNTLoRAConfig(rank_budget="fixed")
    model = get_lava_model(net, config(r=9, target_modules=["first"]), settings, data())
    assert model.lava_report.errors["first"] < 0.5
    term = OrthogonalityLoss(model, strength=1.0)
    assert next(iter(term.factors.values())).shape == (6, 9)
    assert term() < 1e-3


def test_a_shared_budget_gives_ranks_of_their_own(net, tmp_path, make_net, x):
    model = get_lava_model(net, config(), CNTLoRAConfig(rank_budget="ranks"), data())
    ranks = model.lava_plans["default"].ranks
    assert sum(ranks[name] for name in WITH_CLOSED_FORM) == 3 * 4
    assert len(set(ranks.values())) > 1
    assert all(
        layer.scaling["default"] == pytest.approx(2) for layer in lava_layers(model).values()
    )
    assert {n: layer.r["default"] for n, layer in lava_layers(model).items()} == ranks
    with pytest.raises(ValueError, match="counts a LoRA's parameters"):
        get_lava_model(make_net(), config(), CNTLoRAConfig(rank_budget="parameters"), data())


def test_difference_and_fewer_terms():
    torch.manual_seed(3)

    def planned(scaling=2.0):
        return LavaFactors(
            torch.randn(7, 2), torch.randn(5, 2), (torch.randn(3, 2), torch.randn(2, 2)), scaling
        )

    one, two = planned(), planned()
    both = difference(one, two)
    torch.testing.assert_close(both.delta(), one.delta() - two.delta(), rtol=1e-5, atol=1e-5)
    back, error = brought_back(difference(one, one), 2)
    assert back.rank == 2
    assert error == 0 or back.delta().norm() < 1e-4
    same, error = brought_back(one, 2)
    assert error < 1e-4
    torch.testing.assert_close(same.delta(), one.delta(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="differ in scaling"):
        difference(one, planned(1.0))


def test_a_plain_adapter_is_saved_as_it_is(net, make_net, x, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(net, config())
    train(model, x)
    report = save_converted(model, tmp_path)
    assert report.ranks == report.trained_ranks == dict.fromkeys(layers(model), 3)
    assert torch.equal(PeftModel.from_pretrained(make_net(), tmp_path)(x), model(x))


def test_the_snapshot_is_a_copy(net):
    model = get_lava_model(net, config(target_modules=["head"]), None, data())
    layer = lava_layers(model)["head"]
    taken = snapshot(layer)
    with torch.no_grad():
        layer.lava_V["default"].add_(1)
    assert not torch.equal(taken.v, layer.lava_V["default"])
    assert isinstance(layer.base_layer, nn.Linear)
