"""A trained adapter whose initialisation was taken out of the base, saved for the stock base."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core import (
    CNTLoRAConfig,
    get_cntlora_model,
    initialize_lora_cntlora_weights,
    save_converted,
)
from cntlora_core.adapter.inject import adapter_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.a = nn.Linear(6, 8)
        self.b = Conv1D(5, 8)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(self.conv(x).mean((2, 3)))))))


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 2, 7, 7, generator=generator) for _ in range(3)]


def lora(**options):
    return LoraConfig(r=3, lora_alpha=6, target_modules=["conv", "a", "b"], **options)


def train(model) -> torch.Tensor:
    """A few steps that move everything trainable; what the model then gives."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for x in data():
        optimizer.zero_grad()
        (model(x) - 1.0).square().sum().backward()
        optimizer.step()
    return model(data()[0]).detach()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"lora_bias": True}, {"modules_to_save": ["head"]}],
    ids=str,
)
@pytest.mark.parametrize("budget", ["fixed", "ranks"])
def test_the_converted_adapter_on_the_stock_base_is_the_trained_model(tmp_path, options, budget):
    model = get_cntlora_model(Net(), lora(**options), CNTLoRAConfig(rank_budget=budget), data())
    trained = train(model)
    report = save_converted(model, tmp_path / "to" / "here")
    assert report.ranks == {name: 2 * rank for name, rank in report.trained_ranks.items()}
    assert report.relative_error == 0
    assert torch.equal(model(data()[0]), trained)
    loaded = PeftModel.from_pretrained(Net(), report.path)
    x = data()[0]
    torch.testing.assert_close(loaded(x), trained, rtol=1e-4, atol=1e-4)
    assert {n: layer.r["default"] for n, layer in adapter_layers(loaded).items()} == report.ranks
    if "modules_to_save" not in options:
        with loaded.disable_adapter():
            torch.testing.assert_close(loaded(x), Net()(x))
    torch.testing.assert_close(loaded.merge_and_unload()(x), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the base weights of this model were rewritten")
def test_peft_s_own_conversion_agrees(tmp_path):
    model = get_cntlora_model(Net(), lora(), CNTLoRAConfig(), data())
    model.save_pretrained(tmp_path / "start")
    trained = train(model)
    model.save_pretrained(
        tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    save_converted(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key])
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "peft")
    torch.testing.assert_close(loaded(data()[0]), trained, rtol=1e-4, atol=1e-4)


def test_truncated_to_the_trained_rank_it_is_as_near_as_it_says(tmp_path):
    model = get_cntlora_model(Net(), lora(), CNTLoRAConfig(), data())
    train(model)
    exact = save_converted(model, tmp_path / "exact")
    near = save_converted(model, tmp_path / "near", compress=True)
    assert near.ranks == near.trained_ranks == exact.trained_ranks
    deltas = []
    for report in (exact, near):
        layers = adapter_layers(PeftModel.from_pretrained(Net(), report.path))
        deltas.append(torch.cat([x.get_delta_weight("default").flatten() for x in layers.values()]))
    error = (deltas[1] - deltas[0]).norm() / deltas[0].norm()
    assert 0 < error < 1
    assert float(error) == pytest.approx(near.relative_error, rel=1e-3)


def test_an_adapter_with_a_name_of_its_own_goes_straight_into_the_folder(tmp_path):
    model = get_peft_model(Net(), lora(), "mine")
    model = initialize_lora_cntlora_weights(
        model, data(), CNTLoRAConfig(rank_budget="fixed"), adapter_name="mine"
    )
    trained = train(model)
    save_converted(model, tmp_path, adapter_name="mine")
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(loaded(data()[0]), trained, rtol=1e-4, atol=1e-4)


def test_where_the_base_was_left_alone_nothing_is_taken_out(tmp_path):
    model = get_cntlora_model(Net(), lora(), CNTLoRAConfig(preserve_output=False), data())
    trained = train(model)
    report = save_converted(model, tmp_path)
    assert report.ranks == report.trained_ranks
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(loaded(data()[0]), trained, rtol=1e-4, atol=1e-4)


def test_a_plain_adapter_is_saved_as_it_is(tmp_path):
    model = get_peft_model(Net(), lora())
    trained = train(model)
    report = save_converted(model, tmp_path)
    assert report.ranks == report.trained_ranks == {"conv": 3, "a": 3, "b": 3}
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(data()[0]), trained)
    with pytest.raises(ValueError, match=r"no adapter 'other'; there are \['default'\]"):
        save_converted(model, tmp_path, adapter_name="other")


FRESH = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
base = torch.nn.Sequential(
    torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 5), torch.nn.Linear(5, 3)
)
base.load_state_dict(load_file(folder + "/base.safetensors"))
x = load_file(folder + "/x.safetensors")["x"]
model = PeftModel.from_pretrained(base, folder + "/one", adapter_name="one")
model.load_adapter(folder + "/two", adapter_name="two")
given = {}
with torch.no_grad():
    for name in ("one", "two"):
        model.set_adapter(name)
        given[name] = model(x)
    with model.disable_adapter():
        given["disabled"] = model(x)
    model.set_adapter("one")
    model.merge_adapter()
    given["merged"] = model(x)
    model.unmerge_adapter()
    given["unmerged"] = model(x)
    given["unloaded"] = model.unload()(x)
save_file(given, folder + "/given.safetensors")
assert "cntlora_core" not in sys.modules
"""


@pytest.mark.thorough
def test_a_fresh_process_with_peft_alone_gets_the_trained_models(tmp_path):
    def base():
        torch.manual_seed(8)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 3))

    x = torch.randn(7, 2, 5, 5)
    config = LoraConfig(r=2, target_modules=["0", "2", "3"])
    with torch.no_grad():
        wanted = {name: base()(x) for name in ("disabled", "unloaded")}
    for name, settings in (
        ("one", CNTLoRAConfig()),
        ("two", CNTLoRAConfig(constraint="self", preserve_output=False)),
    ):
        model = get_cntlora_model(base(), config, settings, [x])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        model(x).square().sum().backward()
        optimizer.step()
        wanted[name] = model(x).detach()
        save_converted(model, tmp_path / name)
    wanted["merged"] = wanted["unmerged"] = wanted["one"]
    save_file(base().state_dict(), tmp_path / "base.safetensors")
    save_file({"x": x}, tmp_path / "x.safetensors")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True, timeout=300)
    given = load_file(tmp_path / "given.safetensors")
    for name, output in wanted.items():
        torch.testing.assert_close(given[name], output, rtol=1e-4, atol=1e-4, msg=name)
    assert (wanted["one"] - wanted["disabled"]).abs().max() > 1e-3
    config_file = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config_file["rank_pattern"]["^0"] == 2 * model.peft_config["default"].rank_pattern["^0"]
