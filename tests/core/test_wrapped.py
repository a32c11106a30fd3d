"""Models that are wrapped already, several adapters, and what peft's configuration may ask for."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core import CNTLoRAConfig, get_cntlora_model, initialize_lora_cntlora_weights
from cntlora_core.adapter.inject import adapter_layers

KEEP = CNTLoRAConfig(rank_budget="fixed", preserve_output=False)
REWRITE = CNTLoRAConfig(rank_budget="fixed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(6, 8)
        self.b = Conv1D(5, 8)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, generator=generator) for _ in range(3)]


def lora(**options):
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["a", "b"], **options})


def weights_of(model, word):
    return {n: p.detach().clone() for n, p in model.named_parameters() if word in n}


def test_only_the_named_adapter_changes_and_the_others_stay_valid():
    model = get_peft_model(Net(), lora(), "one")
    model.add_adapter("two", lora(r=2))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B["one"].weight)
    x = data()[0]
    model.set_adapter("one")
    of_one, others = model(x), weights_of(model, ".one.") | weights_of(model, "base_layer")
    with model.disable_adapter():
        of_base = model(x)
    initialize_lora_cntlora_weights(model, data(), KEEP, adapter_name="two")
    now = weights_of(model, ".one.") | weights_of(model, "base_layer")
    assert all(torch.equal(now[name], weight) for name, weight in others.items())
    assert torch.equal(model(x), of_one)
    # The initialisation of "two" is that of a model which has never had another adapter.
    alone = get_cntlora_model(Net(), lora(r=2), KEEP, data())
    model.set_adapter("two")
    torch.testing.assert_close(model(x), alone(x), rtol=1e-4, atol=1e-5)
    assert (model(x) - of_base).abs().max() > 1e-3


def test_rewriting_a_base_that_other_adapters_need_is_refused():
    model = get_peft_model(Net(), lora(), "one")
    model.add_adapter("two", lora())
    with pytest.raises(ValueError, match=r"other adapters \['one'\] were made for.*=False"):
        initialize_lora_cntlora_weights(model, data(), REWRITE, adapter_name="two")


def test_a_base_that_was_rewritten_is_no_base_for_another_initialisation():
    model = initialize_lora_cntlora_weights(get_peft_model(Net(), lora()), data(), REWRITE)
    with pytest.raises(ValueError, match="rewritten for the initialisation of adapter 'default'"):
        initialize_lora_cntlora_weights(model, data(), REWRITE)
    with pytest.warns(UserWarning, match="adapter 'two' will fit no other model"):
        model.add_adapter("two", lora())
    with pytest.raises(ValueError, match="load it anew"):
        initialize_lora_cntlora_weights(model, data(), KEEP, adapter_name="two")


def test_the_ranks_and_scalings_of_a_wrapped_model_stand():
    config = lora(rank_pattern={"a": 5}, alpha_pattern={"b": 1.5}, use_rslora=True)
    model = initialize_lora_cntlora_weights(get_peft_model(Net(), config), data(), REWRITE)
    assert model.cntlora_report.ranks == {"a": 5, "b": 3}
    x = data()[0]
    torch.testing.assert_close(model(x), Net()(x), rtol=1e-4, atol=1e-5)
    # The same patterns are followed where the model is wrapped here.
    fresh = get_cntlora_model(Net(), config, REWRITE, data())
    for a, b in zip(adapter_layers(model).values(), adapter_layers(fresh).values(), strict=True):
        assert a.scaling == b.scaling
        assert torch.equal(a.lora_A["default"].weight, b.lora_A["default"].weight)


def test_half_precision_adapters_are_taken_out_of_the_base_as_they_are_stored():
    base = Net().to(torch.bfloat16).to(torch.float32)
    model = get_peft_model(copy.deepcopy(base), lora())
    for layer in adapter_layers(model).values():
        layer.lora_A.to(torch.bfloat16)
        layer.lora_B.to(torch.bfloat16)
    model = initialize_lora_cntlora_weights(model, data(), REWRITE)
    for name, layer in adapter_layers(model).items():
        stored = (
            2.0 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        )
        whole = layer.get_base_layer().weight + (stored.T if name == "b" else stored)
        torch.testing.assert_close(whole, base.get_submodule(name).weight, rtol=0, atol=1e-5)
        assert torch.equal(
            model.cntlora_plan.factors[name].down, layer.lora_A["default"].weight.float()
        )


def test_dora_starts_at_the_weight_plus_delta():
    base = Net()
    config = LoraConfig(r=3, target_modules=["a"], use_dora=True)
    plain = get_cntlora_model(
        copy.deepcopy(base), LoraConfig(r=3, target_modules=["a"]), KEEP, data()
    )
    model = get_cntlora_model(base, config, KEEP, data())
    x = data()[0]
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_bias_of_the_adapter_starts_at_zero():
    model = get_cntlora_model(Net(), lora(lora_bias=True), REWRITE, data())
    x = data()[0]
    torch.testing.assert_close(model(x), Net()(x), rtol=1e-4, atol=1e-5)


def test_merging_switching_disabling_and_unloading_do_what_peft_says():
    x = data()[0]
    model = get_cntlora_model(Net(), lora(), KEEP, data())
    before = model(x)
    model.add_adapter("plain", lora(r=2))
    model.set_adapter("plain")
    torch.testing.assert_close(model(x), Net()(x))
    model.set_adapter("default")
    torch.testing.assert_close(model(x), before)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), Net()(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.unload()(x), Net()(x), rtol=1e-4, atol=1e-5)


def test_tied_weights_are_not_rewritten():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    ids = [torch.arange(9)]
    config = LoraConfig(r=2, target_modules=["head"])
    with pytest.raises(ValueError, match="'head', but it is tied, embed and head use it"):
        get_cntlora_model(Tied(), config, REWRITE, ids)
    base = Tied()
    before = base.embed.weight.detach().clone()
    model = get_cntlora_model(base, config, KEEP, ids)
    assert torch.equal(base.embed.weight, before)
    assert model.cntlora_report.filled == {}


class Shared(nn.Module):
    """A layer whose weight's memory another layer uses, through a parameter of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        memory = torch.randn(12, 12)
        one, other = {
            "rows": (memory[:6], memory[3:9]),
            "transposed": (memory[:6], memory[:6].T),
            "another type": (memory[:6], memory[:6].view(torch.int32)),
            "columns": (memory[:, :6], memory[:, 6:]),
            "neighbours": (memory[:6], memory[6:]),
        }[how]
        self.one = nn.Linear(one.shape[1], one.shape[0], bias=False)
        self.one.weight = nn.Parameter(one)
        self.other = nn.Module()
        self.other.weight = nn.Parameter(other, requires_grad=False)

    def forward(self, x):
        return self.one(x)


@pytest.mark.parametrize("how", ["rows", "transposed", "another type"])
def test_a_weight_whose_memory_another_parameter_uses_is_not_rewritten(how):
    base, x = Shared(how), torch.randn(5, 12)
    before = base.other.weight.clone()
    with pytest.raises(ValueError, match="'one', but it is tied, one and other use it"):
        get_cntlora_model(base, LoraConfig(r=2, target_modules=["one"]), REWRITE, [x])
    assert torch.equal(base.other.weight, before)


@pytest.mark.parametrize("how", ["columns", "neighbours"])
def test_a_weight_that_merely_lies_in_the_same_buffer_is_rewritten(how):
    base = Shared(how)
    x, before = torch.randn(5, base.one.in_features), base.other.weight.clone()
    expected = base(x).detach()
    model = get_cntlora_model(base, LoraConfig(r=2, target_modules=["one"]), REWRITE, [x])
    assert torch.equal(model.get_base_model().other.weight, before)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model(x), expected)


def test_a_layer_that_has_two_names_is_not_rewritten():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.again = nn.Linear(6, 6)

        def forward(self, x):
            return self.again(torch.tanh(self.one(x)))

    with pytest.raises(ValueError, match="again and one use it"):
        get_cntlora_model(Twice(), lora(target_modules=["one"]), REWRITE, [torch.randn(5, 6)])


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, ids):
        return self.b(torch.tanh(self.a(self.embed(ids))))


@pytest.mark.parametrize("settings", [KEEP, REWRITE])
def test_trained_tokens_are_initialised_as_the_base_s(settings):
    ids = torch.arange(9)[None]
    model = get_cntlora_model(
        Reader(), lora(trainable_token_indices={"embed": [1, 4]}), settings, [ids]
    )
    assert not [n for n, p in model.named_parameters() if p.is_meta]
    torch.testing.assert_close(
        model.get_submodule("base_model.model.embed")(ids), Reader().embed(ids)
    )
    if settings is REWRITE:
        torch.testing.assert_close(model(ids), Reader()(ids), rtol=1e-4, atol=1e-5)


def test_an_adapter_without_values_is_refused_before_anything_is_touched():
    base = Net()
    model = get_peft_model(base, lora(), low_cpu_mem_usage=True)
    before = weights_of(model, "base_layer")
    with pytest.raises(ValueError, match=r"on the meta device.*without low_cpu_mem_usage"):
        initialize_lora_cntlora_weights(model, data(), REWRITE)
    after = weights_of(model, "base_layer")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_weight_that_is_computed_is_not_rewritten():
    base, x = (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        torch.randn(5, 4),
    )
    config, before = LoraConfig(r=2, target_modules="0"), base(x)
    with pytest.raises(ValueError, match="computed from other parameters"):
        get_cntlora_model(base, config, REWRITE, [x])
    model = get_cntlora_model(base, config, KEEP, [x])
    delta = model.cntlora_plan.factors["0"].delta()
    torch.testing.assert_close(model(x), before + x @ delta.T, rtol=1e-4, atol=1e-5)


def test_a_weight_without_values_is_refused():
    with torch.device("meta"):
        base = Net()
    with pytest.raises(TypeError, match="'a' cannot be read: it is on the meta device"):
        get_cntlora_model(base, lora(), KEEP, data())
    base = Net()
    base.a.weight = nn.Parameter(base.a.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"stored as torch\.float8_e4m3fn"):
        get_cntlora_model(base, lora(), KEEP, data())


def merged():
    model = get_peft_model(Net(), lora())
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (
            lambda: get_peft_model(Net(), lora()),
            {"adapter_name": "x"},
            r"the model has \['default'\]",
        ),
        (lambda: get_peft_model(Net(), LoHaConfig(target_modules=["a"])), {}, "is of LoHaConfig"),
        (Net, {}, "expected a peft.PeftModel, got a Net"),
        (lambda: get_peft_model(Net(), lora(init_lora_weights="olora")), {}, "changed the base"),
        (merged, {}, r"unmerge_adapter\(\)"),
    ],
)
def test_wrapped_models_that_no_initialisation_fits_are_refused(make, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        initialize_lora_cntlora_weights(make(), data(), REWRITE, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "another initialisation"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
        ({"target_parameters": ["a.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens changes"),
        ({"rank_pattern": {"a": 2}}, "use rank_budget='fixed'"),
        ({"rank_pattern": {"a": 7}, "r": 2}, "use rank_budget='fixed'"),
    ],
)
def test_configurations_that_do_not_go_with_an_initialisation_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        get_cntlora_model(Net(), lora(**options), CNTLoRAConfig(), data())


def test_a_pattern_s_rank_is_checked_against_its_own_point():
    with pytest.raises(ValueError, match="rank 7 is above the width of 'a'"):
        get_cntlora_model(Net(), lora(rank_pattern={"a": 7}), REWRITE, data())


def test_data_parallel_wrappers_are_refused():
    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, module) -> None:
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match=r"model\.module"):
        get_cntlora_model(Wrapper(Net()), lora(), KEEP, data())


def test_a_loaded_adapter_can_be_initialised_anew(tmp_path):
    get_cntlora_model(Net(), lora(), KEEP, data()[:1]).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    loaded = initialize_lora_cntlora_weights(loaded, data(), KEEP)
    fresh = get_cntlora_model(Net(), lora(), KEEP, data())
    x = data()[0]
    torch.testing.assert_close(loaded(x), fresh(x), rtol=1e-4, atol=1e-5)
