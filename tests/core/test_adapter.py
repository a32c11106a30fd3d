"""Whole initialisation of a model: what peft sees, and what the first step gives."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core import CNTLoRAConfig, get_cntlora_model, initialize_lora_cntlora_weights
from cntlora_core.adapter.inject import adapter_layers
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.methods import initialize_adapter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(12, 20)
        self.ab = nn.Linear(12, 20)
        self.c = Conv1D(10, 20)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.c(torch.tanh(self.a(x)) + self.ab(x))))


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, 12, generator=generator) for _ in range(6)]


def lora_config(**options):
    return LoraConfig(r=4, lora_alpha=8, target_modules=["a", "ab", "c"], **options)


CONFIGS = [
    CNTLoRAConfig(constraint=c, factorization=f, rank_budget=b)
    for c in ("cross", "self", "shift")
    for f in ("svd", "qr")
    for b in ("fixed", "ranks", "parameters")
] + [CNTLoRAConfig(subspace="full"), CNTLoRAConfig(constraint="shift", shift="normal")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.to_json()[:0] or repr(c)[14:70])
def test_first_output_is_that_of_the_base(config):
    base = Net()
    x = data()[0]
    before = base(x)
    weight = base.a.weight.detach().clone()
    model = get_cntlora_model(base, lora_config(), config, data())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    layers = adapter_layers(model)
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in layers.values())
    assert (layers["a"].get_base_layer().weight - weight).abs().max() > 1e-3
    ranks = model.cntlora_report.ranks
    if config.rank_budget == "fixed":
        assert set(ranks.values()) == {4}
    elif config.rank_budget == "ranks":
        assert sum(ranks.values()) == 12
    assert {n: layer.r["default"] for n, layer in layers.items()} == ranks
    assert {round(layer.scaling["default"], 6) for layer in layers.values()} == {2.0}


def test_without_preserve_output_the_model_starts_at_base_plus_delta():
    base = Net()
    weight = base.c.weight.detach().clone()
    model = get_cntlora_model(base, lora_config(), CNTLoRAConfig(preserve_output=False), data())
    layer = adapter_layers(model)["c"]
    torch.testing.assert_close(layer.get_base_layer().weight, weight)
    delta = model.cntlora_plan.factors["c"].delta()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", ["fixed", "ranks"])
def test_peft_saves_loads_and_merges_the_adapter(tmp_path, budget):
    config = CNTLoRAConfig(rank_budget=budget, preserve_output=False)
    model = get_cntlora_model(Net(), lora_config(), config, data())
    x = data()[0]
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)


def test_a_wrapped_model_gets_the_same_initialisation_as_an_unwrapped_one():
    config = CNTLoRAConfig(rank_budget="fixed")
    fresh = get_cntlora_model(Net(), lora_config(), config, data())
    wrapped = get_peft_model(Net(), lora_config())
    wrapped = initialize_lora_cntlora_weights(wrapped, data(), config)
    for (name, a), b in zip(
        adapter_layers(fresh).items(), adapter_layers(wrapped).values(), strict=True
    ):
        delta_a, delta_b = a.get_delta_weight("default"), b.get_delta_weight("default")
        torch.testing.assert_close(delta_a, delta_b, rtol=1e-3, atol=1e-3, msg=name)
        torch.testing.assert_close(a.get_base_layer().weight, b.get_base_layer().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_get_float32_adapters(dtype):
    base = Net().to(dtype)
    x = [batch.to(dtype) for batch in data()]
    before = base(x[0])
    model = get_cntlora_model(base, lora_config(), CNTLoRAConfig(), x)
    for layer in adapter_layers(model).values():
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert layer.get_base_layer().weight.dtype == dtype
    torch.testing.assert_close(model(x[0]), before, rtol=0.1, atol=0.1)


def test_a_batch_with_half_the_directions_reports_what_was_filled():
    narrow = [torch.randn(1, 2, 12)]
    model = get_cntlora_model(Net(), lora_config(), CNTLoRAConfig(rank_budget="fixed"), narrow)
    assert model.cntlora_report.filled == {"a": 2, "ab": 2, "c": 2}
    assert "initialised as plain LoRA" in model.cntlora_report.summary()


def test_same_seed_same_initialisation():
    first, second = (
        get_cntlora_model(Net(), lora_config(), CNTLoRAConfig(seed=5), data()[:1]) for _ in range(2)
    )
    for a, b in zip(adapter_layers(first).values(), adapter_layers(second).values(), strict=True):
        assert torch.equal(a.lora_A["default"].weight, b.lora_A["default"].weight)


def test_a_name_that_ends_like_another_is_not_wrapped_along():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(12, 20)
            self.inner = nn.ModuleDict({"a": nn.Linear(20, 5)})

        def forward(self, x):
            return self.inner["a"](self.a(x))

    base, x = Outer(), data()[0]
    before = base(x)
    model = get_cntlora_model(base, LoraConfig(r=2, target_modules="a"), CNTLoRAConfig(), [x])
    assert list(adapter_layers(model)) == ["a"]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_all_linear_is_understood_as_peft_does():
    base = Net()
    model = get_cntlora_model(
        base, LoraConfig(r=2, target_modules="all-linear"), CNTLoRAConfig(), data()
    )
    assert set(adapter_layers(model)) == {"a", "ab", "c", "head"}


@pytest.mark.filterwarnings("ignore:the base weights of this model were rewritten")
def test_peft_subtracts_the_initialisation_for_the_stock_base(tmp_path):
    model = get_cntlora_model(Net(), lora_config(), CNTLoRAConfig(), data())
    x = data()[0]
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_A["default"].weight.mul_(1.3)
            layer.lora_B["default"].weight.add_(0.05)
    expected = model(x)
    model.save_pretrained(
        tmp_path / "trained", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "trained")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)


def test_the_delta_acts_in_the_subspace_of_the_rank_that_was_given():
    model = get_cntlora_model(Net(), lora_config(), CNTLoRAConfig(), data())
    rows = torch.cat([batch.reshape(-1, 12) for batch in data()])
    moment = rows.T @ rows
    vectors = torch.linalg.eigh(moment)[1].flip(1)
    for name in ("a", "ab"):
        factors = model.cntlora_plan.factors[name]
        outside = factors.delta() @ vectors[:, factors.rank :]
        assert outside.norm() < 1e-3 * factors.delta().norm()


def test_inside_inference_mode_it_works_too():
    with torch.inference_mode():
        batches = data()
        model = get_cntlora_model(Net(), lora_config(), CNTLoRAConfig(), batches)
        assert model.cntlora_report.points == 3


def test_misuse_is_refused_in_words():
    with pytest.raises(ValueError, match="no batches"):
        get_cntlora_model(Net(), lora_config(), CNTLoRAConfig(), [])
    with pytest.raises(ValueError, match="target_modules is empty"):
        get_cntlora_model(Net(), LoraConfig(r=4), CNTLoRAConfig(), data())
    with pytest.raises(ValueError, match="rank_pattern"):
        get_cntlora_model(Net(), lora_config(rank_pattern={"a": 2}), CNTLoRAConfig(), data())
    wrapped_before = get_peft_model(Net(), lora_config())
    with pytest.raises(ValueError, match="carries an adapter already"):
        get_cntlora_model(wrapped_before.base_model.model, lora_config(), None, data())
    wide = LoraConfig(r=11, target_modules=["a", "ab", "c"])
    with pytest.raises(ValueError, match="above the width of 'c'"):
        get_cntlora_model(Net(), wide, CNTLoRAConfig(rank_budget="fixed"), data())
    with pytest.raises(ValueError, match="more than their widths hold"):
        get_cntlora_model(Net(), LoraConfig(r=64, target_modules=["a"]), None, data())
    with pytest.raises(ValueError, match="use preserve_output=False"):
        get_cntlora_model(Net(), lora_config(use_dora=True), CNTLoRAConfig(), data())
    wrapped = get_peft_model(Net(), lora_config())
    with pytest.raises(ValueError, match="get_cntlora_model"):
        initialize_lora_cntlora_weights(wrapped, data(), CNTLoRAConfig(rank_budget="ranks"))
    embedding = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="Embedding"):
        get_cntlora_model(embedding, LoraConfig(target_modules=["0"]), None, data())


@pytest.mark.parametrize("alpha", [0, -8, float("nan"), float("inf"), "8"])
@pytest.mark.parametrize("pattern", [False, True])
def test_an_alpha_that_no_factor_can_be_divided_by_is_refused_before_anything_is_read(
    alpha, pattern
):
    def config():
        made = lora_config(alpha_pattern={"ab": 4})
        if pattern:
            made.alpha_pattern = {"ab": alpha}
        else:
            made.lora_alpha = alpha
        return made

    def unread():
        raise AssertionError("read the data before refusing")
        yield

    where = r"alpha_pattern\['ab'\]" if pattern else "lora_alpha"
    fixed = CNTLoRAConfig(rank_budget="fixed")
    words = f"^{where} must be a finite number above 0, got {alpha!r}"
    with pytest.raises(ValueError, match=words):
        get_cntlora_model(Net(), config(), fixed, unread())
    wrapped = get_peft_model(Net(), lora_config())
    wrapped.peft_config["default"] = config()
    with pytest.raises(ValueError, match=words):
        initialize_lora_cntlora_weights(wrapped, unread(), fixed)
    if not pattern:
        for method in ("cross", "lora", "pissa", "eva", "full"):
            plain = LoraConfig(r=4, lora_alpha=alpha, target_modules=["a"])
            with pytest.raises(ValueError, match=words):
                initialize_adapter(Net(), plain, method, unread())


@pytest.mark.parametrize("alpha", [0.0, -8.0, float("nan"), float("inf")])
def test_the_image_trainer_s_settings_refuse_such_an_alpha(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        AdapterSettings(alpha=alpha)
