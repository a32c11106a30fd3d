"""What peft asks of every method, asked of LAVA: one table of models, one test for each demand."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from cntlora_core.lava import LavaConfig, LavaLayer, get_mixed_model


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(10, 5), Conv1D(6, 5), nn.Linear(6, 3)

    def forward(self, x):
        tokens = (x * 3).long().clamp(0, 9)
        return self.lin0(torch.tanh(self.conv1d(self.emb(tokens)))).mean(1)


class Convolution(nn.Module):
    """A convolution with a matrix after it; what it reads are ten numbers a sample."""

    def __init__(self, convolution: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.conv = shape, convolution
        self.lin0 = nn.LazyLinear(3)
        self(torch.zeros(1, 10))

    def forward(self, x):
        x = x.reshape(len(x), *self.shape)
        return self.lin0(torch.tanh(self.conv(x)).flatten(1))


MODELS = {
    "mlp": Mlp,
    "embedded": Embedded,
    "conv1d": lambda: Convolution(nn.Conv1d(2, 4, 3, padding=1), (2, 5)),
    "conv1d groups": lambda: Convolution(nn.Conv1d(2, 4, 2, groups=2), (2, 5)),
    "conv2d": lambda: Convolution(nn.Conv2d(1, 4, (2, 3), padding=1), (1, 2, 5)),
    "conv2d 1x1": lambda: Convolution(nn.Conv2d(2, 4, 1, bias=False), (2, 1, 5)),
    "conv2d groups": lambda: Convolution(nn.Conv2d(2, 4, (1, 2), stride=2, groups=2), (2, 1, 5)),
}
CASES = [
    ("mlp", {"target_modules": "lin0"}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "r": 2}),
    ("mlp", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("mlp", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 4}, "lava_alpha": 4}),
    ("mlp", {"target_modules": ["lin0"], "lava_dropout": 0.1, "bias": "lava_only"}),
    ("embedded", {"target_modules": ["conv1d"]}),
    ("embedded", {"target_modules": ["conv1d", "lin0"]}),
    ("conv1d", {"target_modules": ["conv"]}),
    ("conv1d groups", {"target_modules": ["conv"], "r": 4}),
    ("conv2d", {"target_modules": ["conv", "lin0"]}),
    ("conv2d", {"target_modules": ["conv"], "modules_to_save": ["lin0"]}),
    ("conv2d 1x1", {"target_modules": ["conv"]}),
    ("conv2d groups", {"target_modules": ["conv"], "r": 3}),
]
IDS = [f"{model}-{'-'.join(map(str, options.values()))}" for model, options in CASES]
every_case = pytest.mark.parametrize(("model_id", "options"), CASES, ids=IDS)
several = pytest.mark.parametrize(
    ("model_id", "options"), [c for c in CASES if {"bias", "modules_to_save"}.isdisjoint(c[1])]
)
half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def base_of(model_id: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model_id]().eval()


def config_of(options, **more) -> LavaConfig:
    return LavaConfig(**copy.deepcopy({**options, **more}))


def random_adapter(model_id, options, name="default", **more) -> PeftModel:
    """An adapter that changes what the model gives."""
    model = get_peft_model(base_of(model_id), config_of(options, init_weights=False, **more), name)
    assert isinstance(model, PeftModel)
    return model.eval()


def tuner_layers(model: nn.Module) -> dict[str, LavaLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LavaLayer)}


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(6, 10, generator=torch.Generator().manual_seed(1))


@every_case
def test_layers_say_their_widths_and_carry_the_adapters_name(model_id, options):
    model = random_adapter(model_id, options, "of-mine")
    assert tuner_layers(model)
    for layer in tuner_layers(model).values():
        base = layer.get_base_layer()
        weight = base.weight
        if isinstance(base, Conv1D):
            assert (layer.in_features, layer.out_features) == tuple(weight.shape)
        elif isinstance(base, nn.Linear):
            assert (layer.in_features, layer.out_features) == tuple(weight.shape[::-1])
        else:
            assert (layer.in_features, layer.out_features) == (base.in_channels, base.out_channels)
    assert any("of-mine" in name for name, _ in model.named_parameters())


@every_case
def test_saved_and_loaded(model_id, options, x, tmp_path):
    model = random_adapter(model_id, options)
    step(model, x)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob("*.bin"))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    here = get_peft_model_state_dict(model)
    assert saved.keys() == here.keys()
    assert all(torch.equal(saved[key], here[key]) for key in saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing or unexpected keys
        loaded = PeftModel.from_pretrained(base_of(model_id), tmp_path)
    close(loaded(x), model(x))
    left = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert all(n.endswith("bias") for n in left)  # peft leaves biases as they are trained
    trained_on = PeftModel.from_pretrained(base_of(model_id), tmp_path, is_trainable=True)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trained_on.named_parameters() if p.requires_grad} == names


@every_case
def test_a_configuration_comes_back_as_it_was(model_id, options, tmp_path):
    config = config_of(options, orthogonal_factors=["X", "V"])
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, LavaConfig)
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LAVA"
    config.inference_mode = True
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).inference_mode


@several
def test_adapters_are_saved_each_by_itself(model_id, options, x, tmp_path):
    model = random_adapter(model_id, options, "one")
    model.add_adapter("one_and_a_half", config_of(options, init_weights=False))
    model.add_adapter("two", config_of(options, init_weights=False))
    model.save_pretrained(tmp_path, selected_adapters=["one", "one_and_a_half"])
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"one", "one_and_a_half"}
    keys = [set(load_file(f / "adapter_model.safetensors")) for f in tmp_path.iterdir()
            if f.is_dir()]  # fmt: skip
    assert keys[0] == keys[1]
    assert not any("half" in key for key in keys[0])
    loaded = PeftModel.from_pretrained(base_of(model_id), tmp_path / "one", adapter_name="other")
    close(loaded(x), model(x))
    loaded.load_adapter(tmp_path / "one_and_a_half", adapter_name="one")
    loaded.set_adapter("one")
    model.set_adapter("one_and_a_half")
    close(loaded(x), model(x))


@every_case
def test_loaded_and_injected_without_a_first_copy_in_memory(model_id, options, x, tmp_path):
    model = random_adapter(model_id, options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(model_id), tmp_path, low_cpu_mem_usage=True)
    if "bias" not in options:  # those belong to one adapter
        loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    close(loaded(x), model(x))
    base = base_of(model_id)
    config = config_of(options, modules_to_save=None)
    inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
    assert any(p.is_meta for p in base.parameters())
    state = {k: v for k, v in get_peft_model_state_dict(model).items() if ".lava_" in k}
    set_peft_model_state_dict(base, state, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in base.parameters())


@every_case
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_injected_where_a_state_dict_says(model_id, options, x, prefix):
    options = {**options, "modules_to_save": None}
    source = base_of(model_id)
    inject_adapter_in_model(config_of(options, init_weights=False), source)
    state = get_peft_model_state_dict(source)
    target = base_of(model_id)
    elsewhere = {**options, "target_modules": ["nowhere"], "rank_pattern": {}}
    if "rank_pattern" in options:
        elsewhere["rank_pattern"] = options["rank_pattern"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the configuration names other modules
        inject_adapter_in_model(config_of(elsewhere), target, state_dict=state)
    assert set(tuner_layers(target)) == set(tuner_layers(source))
    given = {prefix + key: value for key, value in state.items()}
    result = set_peft_model_state_dict(target, given)
    assert not result.unexpected_keys
    close(target.eval()(x), source.eval()(x))


@every_case
def test_training_changes_the_adapter_alone(model_id, options, x):
    model = random_adapter(model_id, options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, x)
    assert any(p.requires_grad for p in model.parameters())
    for name, parameter in model.named_parameters():
        own = ".lava_" in name or "modules_to_save" in name or "bias" in options
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert own or not parameter.requires_grad, name


@every_case
def test_merged_unmerged_and_unloaded(model_id, options, x):
    model = random_adapter(model_id, options)
    before = model(x)
    with model.disable_adapter():
        plain = model(x)
    assert (before - plain).abs().max() > 1e-3
    model.merge_adapter()
    close(model(x), before)
    with pytest.warns(UserWarning, match="[Aa]lready"):
        model.merge_adapter()  # once more changes nothing
    close(model(x), before)
    with model.disable_adapter():
        close(model(x), plain)
    close(model(x), before)
    model.unmerge_adapter()
    close(model(x), before)
    close(copy.deepcopy(model).merge_and_unload(safe_merge=True)(x), before)
    model.merge_adapter(safe_merge=True)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not tuner_layers(merged)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    close(merged(x), before)
    model.unmerge_adapter()
    if "modules_to_save" not in options:
        close(model.unload()(x), plain)


@every_case
def test_a_merge_that_is_not_finite_leaves_the_weight(model_id, options):
    model = random_adapter(model_id, options)
    name, layer = next(iter(tuner_layers(model).items()))
    with torch.no_grad():
        layer.lava_V["default"][0, 0] = float("nan")
    before = layer.get_base_layer().weight.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(model.get_submodule(name).get_base_layer().weight, before)


@several
def test_the_base_is_what_is_left_without_the_adapter(model_id, options, x):
    base = base_of(model_id)
    plain, state = base(x), {n: p.detach().clone() for n, p in base.state_dict().items()}
    model = random_adapter(model_id, options)
    with model.disable_adapter():
        close(model(x), plain)
        for layer in tuner_layers(model).values():
            assert layer.disable_adapters
    assert (model(x) - plain).abs().max() > 1e-3
    kept = {
        n.replace(".base_layer", ""): p
        for n, p in model.get_base_model().state_dict().items()
        if ".lava_" not in n
    }
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)


@several
def test_adapters_are_deleted(model_id, options, x):
    model = random_adapter(model_id, options, "one")
    one = model(x)
    model.add_adapter("two", config_of(options, init_weights=False))
    model.set_adapter("two")
    two = model(x)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("three")
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("two")
    model.unmerge_adapter()
    close(model(x), two)
    model.delete_adapter("one")  # inactive
    assert "one" not in model.peft_config
    close(model(x), two)
    model.add_adapter("one", config_of(options))
    with pytest.warns(UserWarning, match="Setting active adapter to one"):
        model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    with model.disable_adapter():
        plain = model(x)
    close(model(x), plain)  # the new one adds nothing yet
    assert (plain - one).abs().max() > 1e-3
    for layer in tuner_layers(model).values():
        names = (*layer.adapter_layer_names, *layer.other_param_names)
        assert not any("two" in getattr(layer, name) for name in names)
    model.delete_adapter("one")
    close(model.base_model.model(x), plain)


@several
def test_several_active_adapters_add_up(model_id, options, x):
    model = random_adapter(model_id, options, "one")
    model.add_adapter("two", config_of({**options, "r": 2}, init_weights=False))
    model.base_model.set_adapter(["one", "two"])
    both = model(x)
    outputs = []
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs.append(model(x))
        assert (outputs[-1] - both).abs().max() > 1e-4
    model.base_model.set_adapter(["one", "two"])
    model.merge_adapter()
    close(model(x), both)
    model.unmerge_adapter()
    model.merge_adapter(["one"])
    model.merge_adapter(["two"])  # in turn, as at once
    close(model(x), both)
    model.unmerge_adapter()
    model.set_adapter("one")
    close(model(x), outputs[0])


@several
def test_gradients_follow_the_active_adapter(model_id, options):
    model = random_adapter(model_id, options, "one")
    model.add_adapter("two", config_of(options))

    def trained():
        return {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"one"}
    model.set_adapter("two")
    assert trained() == {"two"}
    model.base_model.set_adapter(["one", "two"])
    assert trained() == {"one", "two"}
    model.set_requires_grad("one", requires_grad=False)
    assert trained() == {"two"}
    model.set_adapter("one", inference_mode=True)
    assert not trained()


@half
@every_case
def test_half_precision(model_id, options, x, dtype):
    x = x.to(dtype)
    model = get_peft_model(base_of(model_id).to(dtype), config_of(options, init_weights=False))
    assert {p.dtype for n, p in model.named_parameters() if ".lava_" in n} == {torch.float32}
    model.eval()
    before = model(x)
    assert before.dtype == dtype
    model.merge_adapter(safe_merge=True)
    close(model(x), before, 0.1)
    model.unmerge_adapter()
    step(model, x)
    assert model.merge_and_unload()(x).dtype == dtype
    kept = get_peft_model(
        base_of(model_id), config_of(options, init_weights=False), autocast_adapter_dtype=False
    ).to(dtype)
    kept.add_adapter("b", config_of({**options, "bias": "none"}, modules_to_save=None))
    assert isinstance(kept, PeftModel)
    assert {p.dtype for n, p in kept.named_parameters() if "default" in n} == {dtype}
    assert torch.isfinite(kept(x)).all()


@every_case
def test_status_and_copies(model_id, options, x):
    model = random_adapter(model_id, options)
    status = model.get_model_status()
    assert status.peft_types == {"default": "LAVA"}
    assert status.enabled
    assert status.active_adapters == ["default"]
    assert {s.name for s in model.get_layer_status()} >= {
        n.removeprefix("base_model.") for n in tuner_layers(model)
    }
    assert all("lava." in repr(layer) for layer in tuner_layers(model).values())
    close(copy.deepcopy(model)(x), model(x))


@every_case
def test_what_there_is_none_of_is_refused_in_words(model_id, options, x):
    model = random_adapter(model_id, options, "one")
    with pytest.raises(ValueError, match=r"weighted sum.*base_model\.set_adapter"):
        model.add_weighted_adapter(["one"], [0.5], "sum")
    with pytest.raises(ValueError, match="one choice of adapters for a whole batch"):
        model(x, adapter_names=["one"] * len(x))


def test_one_adapter_alone_trains_biases():
    options = {"target_modules": ["lin0"], "bias": "all"}
    model = random_adapter("mlp", options, "one")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("two", config_of(options))


def test_modules_to_save_belong_to_their_adapter(x):
    first = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    model = random_adapter("mlp", first, "one")
    step(model, x)
    one = model(x)
    model.add_adapter("two", config_of({"target_modules": ["lin0"]}, init_weights=False))
    model.set_adapter("two")
    assert (model(x) - one).abs().max() > 1e-3
    model.set_adapter("one")
    close(model(x), one)
    model.delete_adapter("two")
    close(model(x), one)


def test_modules_of_the_base_may_be_named_as_parameters_of_the_adapter_are():
    def named():
        base = base_of("mlp")
        base.lava_head, base.llava_neck = nn.Linear(3, 3), nn.Linear(3, 3)
        return base

    config = {"target_modules": ["lin0", "llava_neck"], "modules_to_save": ["lava_head"]}
    model = get_peft_model(named(), config_of(config, init_weights=False))
    with torch.no_grad():
        model.base_model.model.lava_head.modules_to_save["default"].weight.fill_(9.0)
    state = get_peft_model_state_dict(model)
    assert sorted(key.removeprefix("base_model.model.") for key in state) == [
        "lava_head.bias", "lava_head.weight", "lin0.lava_U", "lin0.lava_V",
        "llava_neck.lava_U", "llava_neck.lava_V",
    ]  # fmt: skip
    other = get_peft_model(named(), config_of(config))
    assert not set_peft_model_state_dict(other, state).unexpected_keys
    loaded = get_peft_model_state_dict(other)
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    target = named()
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    plain = {k: v for k, v in state.items() if not k.startswith("lava_head")}
    elsewhere = config_of({"target_modules": ["lin0", "llava_neck"]})
    inject_adapter_in_model(elsewhere, target, state_dict=plain)
    assert set(tuner_layers(target)) == {"lin0", "llava_neck"}


def bert(**options) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=2,
            **options,
        )
    )


TEXT = {
    "input_ids": torch.arange(10).reshape(2, 5),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
    "labels": torch.tensor([0, 1]),
}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(bert(), LavaConfig(target_modules=["query"], init_weights=False))
        model.train()
        if checkpointing:
            model.enable_input_require_grads()  # which the reentrant way needs
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**TEXT).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        close(gradients[1][name], gradient)


def test_a_task_saves_its_head_and_layers_are_counted(tmp_path):
    config = LavaConfig(
        task_type="SEQ_CLS", target_modules=["query"], layers_to_transform=[1], init_weights=False
    )
    model = get_peft_model(bert(), config)
    assert [n.split("layer.")[1][0] for n in tuner_layers(model)] == ["1"]
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.fill_(0.5)
    model.eval().save_pretrained(tmp_path)
    assert any("classifier" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(bert().eval(), tmp_path)
    close(loaded(**TEXT).logits, model(**TEXT).logits)


LORA = {"r": 2, "init_lora_weights": False}


@pytest.mark.parametrize("active", [["lora", "lava"], ["lava"], ["lora"]])
@pytest.mark.parametrize("deleted", ["lora", "lava", ["lora", "lava"]])
@pytest.mark.parametrize("model_id", ["mlp", "conv2d"])
def test_deleted_from_a_mixed_model(model_id, deleted, active, x):
    target = "lin0" if model_id == "mlp" else "conv"
    other = "lin1" if model_id == "mlp" else "lin0"
    model = get_mixed_model(
        base_of(model_id),
        {
            "lora": LoraConfig(target_modules=[target], **LORA),
            "lava": LavaConfig(target_modules=[target, other], init_weights=False),
        },
    ).eval()
    names = [deleted] if isinstance(deleted, str) else deleted
    left = [name for name in ("lora", "lava") if name not in names]
    model.set_adapter(left)
    expected = model(x) if left else base_of(model_id)(x)
    model.set_adapter(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which adapter becomes active instead
        model.delete_adapter(deleted)
    assert list(model.peft_config) == left
    assert model.active_adapters == left
    close(model(x), expected)
    for name in names:
        assert not any(name in n.split(".") for n, _ in model.named_parameters())
    with pytest.raises(ValueError, match="not found"):
        model.delete_adapter(names[0])


def test_deleting_from_a_mixed_model_keeps_what_is_active_and_frozen(x):
    adapters = {
        "lora": LoraConfig(target_modules=["lin0"], **LORA),
        "lava": LavaConfig(target_modules=["lin1"], init_weights=False),
        "more": LavaConfig(target_modules=["lin0"], init_weights=False),
    }
    model = get_mixed_model(base_of("mlp"), adapters).eval()
    model.set_adapter(["lora", "lava"], inference_mode=True)
    expected = model(x)
    model.delete_adapter("more")
    assert model.active_adapters == ["lora", "lava"]
    assert not any(p.requires_grad for p in model.parameters())
    close(model(x), expected)
