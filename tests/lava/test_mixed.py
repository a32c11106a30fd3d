"""LAVA beside adapters of peft's own methods in one model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from cntlora_core.lava import MixedLavaModel, get_mixed_model

from .conftest import config, layers, trained


def test_beside_lora_on_other_modules(net, make_net, x, tmp_path):
    parts = {
        "matrices": LoraConfig(r=2, target_modules=["head"], init_lora_weights=False),
        "kernels": config(target_modules=["first", "second", "line"]),
    }
    before = net(x)
    model = get_mixed_model(net, parts)
    assert isinstance(model.base_model.model.head, LoraLayer)
    assert set(layers(model)) == {"first", "second", "line"}
    assert (model(x) - before).abs().max() > 1e-3
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 + 4 + 4 + 3
    trained(model, x)
    after = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.save_pretrained(tmp_path)
    loaded = MixedLavaModel.load(make_net(), tmp_path)
    torch.testing.assert_close(loaded(x), after, rtol=1e-4, atol=1e-5)
    # Each part is an adapter that peft reads by itself.
    alone = PeftModel.from_pretrained(make_net(), tmp_path / "kernels")
    model.set_adapter("kernels")
    torch.testing.assert_close(alone(x), model(x), rtol=1e-4, atol=1e-5)
    model.set_adapter(["matrices", "kernels"])
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), after, rtol=1e-4, atol=1e-5)


def test_on_one_module_with_lora(net, x):
    model = get_mixed_model(
        net,
        {
            "lora": LoraConfig(r=2, target_modules=["head"], init_lora_weights=False),
            "lava": config(target_modules=["head"], init_weights=False),
        },
    )
    both = model(x)
    model.set_adapter("lora")
    assert (model(x) - both).abs().max() > 1e-3
    model.set_adapter(["lora", "lava"])
    merged = model.merge_and_unload()
    assert type(merged.head) is nn.Linear
    torch.testing.assert_close(merged(x), both, rtol=1e-4, atol=1e-5)


LORA = {"r": 2, "init_lora_weights": False}


@pytest.mark.parametrize("target", ["head", "first"])
@pytest.mark.parametrize("names", [("z", "a"), ("a", "z")])  # the order of folders, and not
@pytest.mark.parametrize("lava_first", [True, False])
def test_saved_and_loaded_from_one_module(net, make_net, x, tmp_path, target, names, lava_first):
    pair = [
        config(target_modules=[target], init_weights=False),
        LoraConfig(target_modules=[target], **LORA),
    ]
    model = get_mixed_model(net, dict(zip(names, pair if lava_first else pair[::-1])))
    trained(model, x)
    both = model(x)
    model.save_pretrained(tmp_path)
    loaded = MixedLavaModel.from_pretrained(make_net(), tmp_path)
    torch.testing.assert_close(loaded(x), both, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in loaded.parameters())
    for name in names:
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(make_net(), tmp_path / name)
        torch.testing.assert_close(alone(x), model(x), rtol=1e-4, atol=1e-5)
    further = MixedLavaModel.load(make_net(), tmp_path, *names, is_trainable=True)
    trained(further, x)
    assert (further(x) - both).abs().max() > 1e-4


def test_loading_refuses_what_does_not_fit(net, make_net, x, tmp_path):
    model = get_mixed_model(net, {"lava": config(target_modules=["head"])})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has adapters already: load into a base model"):
        MixedLavaModel.load(net, tmp_path)
    tensors = tmp_path / "lava" / "adapter_model.safetensors"
    save_file({"base_model.model.head.lava_U": torch.zeros(4, 3)}, tensors)
    with pytest.raises(ValueError, match=r"does not fit the model: .*head\.lava_V"):
        MixedLavaModel.load(make_net(), tmp_path)


def test_biases_are_refused(net):
    with pytest.raises(ValueError, match="train them with one adapter alone"):
        get_mixed_model(net, {"lava": config(bias="lava_only")})


def test_mixed_refuses_other_methods_in_words(net):
    from peft import IA3Config

    with pytest.raises(TypeError, match=r"beside adapters of LORA.*got a IA3Config"):
        get_mixed_model(net, {"a": IA3Config(target_modules=["head"], feedforward_modules=[])})
