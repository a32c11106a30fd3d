"""LAVA as a peft method: save, load, merge, several adapters and so on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from cntlora_core.lava import LavaConfig

from .conftest import NAMES, config, layers, trained

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize("init_weights", [True, "lora"])
def test_the_initialisation_is_the_base_and_all_factors_are_trained(net, x, init_weights):
    before = net(x)
    model = get_peft_model(net, config(init_weights=init_weights))
    assert set(layers(model)) == set(NAMES)
    assert torch.equal(model(x), before)
    first = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trained(model, x)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in first)
        if name in first:
            assert not torch.equal(parameter, first[name]), name


def test_orthogonal_initialisation_has_orthonormal_columns(net):
    for layer in layers(get_peft_model(net, config())).values():
        u = layer.lava_U["default"]
        torch.testing.assert_close(u.T @ u, torch.eye(3), rtol=0, atol=1e-5)


def test_patterns_give_ranks_and_alphas(net):
    model = get_peft_model(
        net, config(rank_pattern={"^second": 5, "line": 1}, alpha_pattern={"line": 4})
    )
    found = layers(model)
    assert {name: layer.r["default"] for name, layer in found.items()} == {
        **dict.fromkeys(NAMES, 3),
        "second": 5,
        "line": 1,
    }
    assert found["line"].scaling["default"] == 4
    assert found["second"].scaling["default"] == 6 / 5


def test_merge_unmerge_disable_unload(net, x):
    before, weights = net(x), {n: p.detach().clone() for n, p in net.named_parameters()}
    model = trained(get_peft_model(net, config()), x)
    after = model(x)
    assert (after - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.merge_adapter()
    assert (layers(model)["turned"].base_layer.weight - weights["turned.weight"]).abs().max() > 1e-3
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    with model.disable_adapter():  # takes the merged adapter out again
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert not layers(model)["first"].merged
    base = model.unload()
    assert not layers(base)
    torch.testing.assert_close(base(x), before, rtol=1e-4, atol=1e-5)


def test_safe_merge_refuses_what_is_not_finite(net):
    model = get_peft_model(net, config())
    weight = layers(model)["first"].base_layer.weight
    before = weight.detach().clone()
    with torch.no_grad():
        layers(model)["first"].lava_V["default"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="Conv2d not finite: it was not merged there"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(weight, before)


def test_safe_merge_knows_how_far_half_precision_goes():
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2).half()), LavaConfig(target_modules=["0"]))
    with torch.no_grad():
        for factor in model.base_model.model[0].factors("default").values():
            factor.fill_(300.0)
    with pytest.raises(ValueError, match="Linear not finite"):
        model.merge_adapter(safe_merge=True)


def test_all_linear_layers_also_for_one_more_adapter(net):
    model = get_peft_model(net, config(target_modules="all-linear"))
    model.add_adapter("two", config(target_modules="all-linear"))
    found = {name: list(layer.lava_U) for name, layer in layers(model).items()}
    assert found == {name: ["default", "two"] for name in ("turned", "head")}


@pytest.mark.thorough
def test_saved_and_loaded_in_a_fresh_process(net, x, tmp_path):
    model = trained(get_peft_model(net, config(rank_pattern={"second": 2})), x)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.second.lava_U"].shape == (8, 2)
    assert len(tensors) == 3 * 4 + 3 + 2 * 2
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LAVA"
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import runpy, sys, torch, cntlora_core.lava\n"
        "from peft import PeftModel\n"
        "Net, folder = runpy.run_path(sys.argv[2])['Net'], sys.argv[1]\n"
        "model = PeftModel.from_pretrained(Net(), folder)\n"
        "x = torch.load(folder + '/x.pt', weights_only=True)\n"
        "torch.save(model(x), folder + '/y.pt')\n"
        "assert model.active_peft_config.orthogonal_factors == ['U']\n"
        "assert not any(p.requires_grad for p in model.parameters())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(CONFTEST)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "y.pt", weights_only=True)
    torch.testing.assert_close(there, model(x), rtol=1e-5, atol=1e-6)


def test_several_adapters(net, make_net, x, tmp_path):
    model = trained(get_peft_model(net, config(), adapter_name="one"), x)
    one = model(x)
    model.add_adapter("two", config(r=2, target_modules=["second", "head"], init_weights=False))
    torch.testing.assert_close(model(x), one)  # the first is still the active one
    model.set_adapter("two")
    two = model(x)
    assert (two - one).abs().max() > 1e-3
    assert not layers(model)["second"].lava_U["one"].requires_grad
    assert layers(model)["second"].lava_U["two"].requires_grad
    model.base_model.set_adapter(["one", "two"])
    both = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_net(), tmp_path / "one", adapter_name="one")
    loaded.load_adapter(tmp_path / "two", adapter_name="two")
    torch.testing.assert_close(loaded(x), one, rtol=1e-4, atol=1e-5)
    loaded.set_adapter("two")
    torch.testing.assert_close(loaded(x), two, rtol=1e-4, atol=1e-5)
    loaded.delete_adapter("two")
    loaded.set_adapter("one")
    torch.testing.assert_close(loaded(x), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_adapters_in_float32(net, x, dtype):
    model = get_peft_model(net.to(dtype), config(init_weights=False))
    assert layers(model)["first"].lava_U["default"].dtype == torch.float32
    out = model(x.to(dtype))
    assert out.dtype == dtype
    model.merge_adapter()
    torch.testing.assert_close(model(x.to(dtype)), out, rtol=0.1, atol=0.1)
    model.unmerge_adapter()
    trained(model, x.to(dtype))


def test_adapters_may_be_made_in_half_precision():
    torch.set_default_dtype(torch.bfloat16)  # as while transformers loads a model
    try:
        model = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3)), config(target_modules=["0"]))
    finally:
        torch.set_default_dtype(torch.float32)
    u = model.base_model.model[0].lava_U["default"].detach().float()
    torch.testing.assert_close(u.T @ u, torch.eye(3), rtol=0, atol=0.02)


def test_dropout_acts_in_training_only(net, x):
    model = get_peft_model(net, config(lava_dropout=0.5, init_weights=False))
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_injection_and_scales_as_diffusers_uses_them(net, x):
    before = net(x)
    inject_adapter_in_model(config(init_weights=False), net, "style")
    full = net(x)
    for layer in layers(net).values():
        layer.set_scale("style", 0.0)
    torch.testing.assert_close(net(x), before)
    for layer in layers(net).values():
        layer.unscale_layer()
        layer.scale_layer(2.0)
        layer.unscale_layer(2.0)
    torch.testing.assert_close(net(x), full)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.ConvTranspose2d(2, 2, 3), "'0', a ConvTranspose2d; LAVA is for"),
        (nn.Conv3d(2, 2, 3), "'0', a Conv3d"),
        (nn.Embedding(3, 2), "'0', a Embedding"),
        (Standardised(2, 2, 3), "computes something else than Conv2d"),
        (nn.MultiheadAttention(4, 2).out_proj, "an adapter would do nothing"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "computed anew each time"),
        (nn.utils.spectral_norm(nn.Conv1d(3, 2, 1)), "computed anew each time"),
    ],
    ids=lambda case: "" if isinstance(case, str) else type(case).__name__,
)
def test_other_modules_are_refused_in_words(module, words):
    with pytest.raises(ValueError, match=words):
        get_peft_model(nn.Sequential(module), LavaConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "rank is a whole number"),
        ({"rank_pattern": {"a": 1.5}}, "rank_pattern: a rank"),
        ({"lava_dropout": 1.0}, "lava_dropout must lie between"),
        ({"orthogonality": -1.0}, "orthogonality must lie"),
        ({"orthogonal_factors": ["U", "Z"]}, "may name U, V, Y, X; got 'Z'"),
        ({"lava_alpha": 0}, "lava_alpha must be"),
        ({"init_weights": "pissa"}, "orthogonal, lora"),
        ({"lava_alpha": "8"}, "lava_alpha must be"),
        ({"lava_dropout": None}, "lava_dropout must lie between"),
        ({"bias": "some"}, "none, all or lava_only"),
        ({"layers_pattern": ["h"]}, "needs layers_to_transform"),
        ({"target_modules": "x", "layers_to_transform": 1}, "has no effect"),
    ],
)
def test_settings_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        LavaConfig(**options)


def test_nothing_in_place_of_patterns_is_none():
    config = LavaConfig(rank_pattern=None, alpha_pattern=None, orthogonal_factors=None)
    assert (config.rank_pattern, config.alpha_pattern, config.orthogonal_factors) == ({}, {}, [])


def test_a_module_whose_name_holds_the_prefix():
    base = nn.Sequential()
    base.llava_head, base.other = nn.Linear(3, 2), nn.Linear(2, 2)
    given = torch.randn(4, 3)
    model = get_peft_model(base, LavaConfig(target_modules=["llava_head"], init_weights=False))
    model.add_adapter("two", LavaConfig(target_modules=["llava_head"]))
    assert not model.base_model.model.other.weight.requires_grad
    model.delete_adapter("two")
    assert list(layers(model)["llava_head"].lava_U) == ["default"]
    assert len(get_peft_model_state_dict(model)) == 2
    assert model(given).shape == (4, 2)


def test_mixed_batches_are_refused(net, x):
    with pytest.raises(ValueError, match="one choice of adapters for a whole batch"):
        get_peft_model(net, config())(x, adapter_names=["__base__", "default"])


def test_a_second_copy_of_the_library_is_refused_in_words():
    from cntlora_core.lava.registration import register

    with pytest.raises(ImportError, match="registered with peft already"):
        register()
