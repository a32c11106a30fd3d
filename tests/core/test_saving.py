"""Adapters whose initialisation rewrote the base: what is saved of them, and what that loads as."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core import (
    CNTLoRAConfig,
    convert_adapter,
    get_cntlora_model,
    load_initialized,
    save_converted,
)
from cntlora_core.adapter.record import RECORD_FILE
from cntlora_core.lava import LavaConfig, get_lava_model
from cntlora_core.methods import initialize_adapter

TARGETS = ["conv", "a", "b"]


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.a = nn.Linear(6, 8)
        self.b = Conv1D(5, 8)
        self.head = nn.Linear(5, 2)
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(self.conv(x).mean((2, 3)))))))


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 2, 7, 7, generator=generator) for _ in range(3)]


def initialised(method: str, base: nn.Module | None = None, **options) -> PeftModel:
    base = base or Net()
    if method == "lava":
        config = LavaConfig(r=3, lava_alpha=6, target_modules=TARGETS, **options)
        return get_lava_model(base, config, None, data())
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **options)
    if method == "lora_ga":  # linear layers, half their width
        config.target_modules, config.r = {"a", "b"}, 2
    initialized = initialize_adapter(
        base, config, method, data(), loss_fn=lambda model, x: model(x).square().sum()
    )
    assert isinstance(initialized.model, PeftModel)
    return initialized.model


def train(model: nn.Module) -> torch.Tensor:
    """A few steps that move everything trainable; what the model then gives."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for x in data():
        optimizer.zero_grad()
        (model(x) - 1.0).square().sum().backward()
        optimizer.step()
    return model(data()[0]).detach()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() < 1e-4 * other.norm())


METHODS = ["cross", "self", "shift", "pissa", "olora", "corda_ipm", "lora_ga", "lava"]


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_saves_is_refused_on_the_stock_base_and_loads_on_the_rewritten_one(
    method, tmp_path
):
    model = initialised(method)
    trained = train(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="fit a rewritten base model, not the stock one"):
        PeftModel.from_pretrained(Net(), tmp_path / "raw")
    other = PeftModel.from_pretrained(Net(), saved_plainly(tmp_path / "plain", method))
    with pytest.raises(ValueError, match=r"cntlora_core\.convert_adapter"):
        other.load_adapter(tmp_path / "raw", "other")
    loaded = load_initialized(Net(), tmp_path / "raw")
    assert torch.equal(loaded(data()[0]), trained)
    assert not loaded.training
    assert not [p for p in loaded.parameters() if p.requires_grad]
    # It can be saved for the stock base from the model, from the loaded one, and from the folder.
    save_converted(model, tmp_path / "one")
    save_converted(loaded, tmp_path / "two")
    report = convert_adapter(tmp_path / "raw", tmp_path / "three")
    one, *others = (load_file(tmp_path / n / "adapter_model.safetensors") for n in WRITTEN)
    for tensors in others:
        assert tensors.keys() == one.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in one.items())
    assert any(report.ranks[name] == 2 * rank for name, rank in report.trained_ranks.items())
    for name in WRITTEN:
        stock = PeftModel.from_pretrained(Net(), tmp_path / name)
        assert close(stock(data()[0]), trained)
        assert {p.name for p in (tmp_path / name).iterdir()} == FILES


WRITTEN = ["one", "two", "three"]
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def saved_plainly(folder, method: str):
    from peft import get_peft_model

    config = (LavaConfig if method == "lava" else LoraConfig)(r=2, target_modules=TARGETS)
    get_peft_model(Net(), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["cross", "lava"])
def test_training_goes_on_from_what_was_saved(method, tmp_path):
    model = initialised(method)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = load_initialized(Net(), tmp_path, is_trainable=True)
    assert torch.equal(train(loaded), train(model))
    assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])


@pytest.mark.parametrize("budget", ["fixed", "ranks"])
def test_rank_stabilised_scaling_saved_modules_and_biases_survive(tmp_path, budget):
    initialized = initialize_adapter(
        Net(),
        LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=TARGETS,
            use_rslora=True,
            lora_bias=True,
            modules_to_save=["head"],
            rank_pattern={"a": 2} if budget == "fixed" else {},
        ),
        "cross",
        data(),
        cntlora_config=CNTLoRAConfig(rank_budget=budget),
    )
    trained = train(initialized.model)
    initialized.save_pretrained(tmp_path / "converted")
    initialized.model.save_pretrained(tmp_path / "raw")
    for model in (
        PeftModel.from_pretrained(Net(), tmp_path / "converted"),
        load_initialized(Net(), tmp_path / "raw"),
        load_initialized(Net(), tmp_path / "converted"),
    ):
        assert close(model(data()[0]), trained)
    assert "peft" in (tmp_path / "converted" / "README.md").read_text()


@pytest.mark.parametrize("method", ["cross", "pissa", "olora", "corda_ipm", "corda_kpm"])
def test_saving_leaves_the_live_model_as_it_is(method, tmp_path):
    base, config = Net(), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    initialized = initialize_adapter(base, config, method, data())
    train(initialized.model)
    before = {n: t.clone() for n, t in initialized.model.state_dict().items()}
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        initialized.save_pretrained(tmp_path / "file")
    initialized.save_pretrained(tmp_path / "folder")
    after = initialized.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["cross", "lava"])
def test_another_base_is_refused_and_left_alone(method, tmp_path):
    model = initialised(method)
    model.save_pretrained(tmp_path)
    changed = Net()
    with torch.no_grad():
        changed.a.weight[0, 0] += 1e-6
    for base, words in (
        (changed, r"'a' was float32 8x6 with the hash \w+ and is float32 8x6 with the hash"),
        (Net(torch.bfloat16), "is bfloat16 6x2x3x3"),
        (model, "has adapters already"),
        (nn.Sequential(nn.Linear(6, 8)), "another model: there is no 'conv'"),
    ):
        before = {n: t.clone() for n, t in base.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            load_initialized(base, tmp_path)
        assert before.keys() == base.state_dict().keys()
        assert all(torch.equal(base.state_dict()[n], t) for n, t in before.items())


def test_a_base_in_half_precision_is_rewritten_as_before(tmp_path):
    batches = [x.bfloat16() for x in data()]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    model = get_cntlora_model(Net(torch.bfloat16), config, None, batches)
    assert model.cntlora_report.rounding > 0
    model.save_pretrained(tmp_path)
    loaded = load_initialized(Net(torch.bfloat16), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def spoiled(folder, how: str) -> None:
    record = folder / RECORD_FILE
    if how == "gone":
        record.unlink()
    elif how == "cut":
        record.write_bytes(record.read_bytes()[:-9])
    elif how == "no record":
        record.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    elif how == "another's":
        initialised("pissa", rank_pattern={}, exclude_modules=["b"]).save_pretrained(folder / "x")
        (folder / "x" / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")
    else:
        (folder / "adapter_config.json").write_text("[")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("gone", "cntlora_initialization.safetensors is missing"),
        ("cut", "cannot be read as a record of an initialisation"),
        ("no record", "its format is 'pt'"),
        ("another's", "do not belong together.*base_model.model.b.lora_A"),
        ("config", r"adapter_config.json is damaged"),
    ],
)
def test_files_that_lack_their_record_are_refused(tmp_path, how, words):
    model = initialised("cross")
    model.save_pretrained(tmp_path / "raw")
    spoiled(tmp_path / "raw", how)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        convert_adapter(tmp_path / "raw", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    if how != "another's":
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load_initialized(Net(), tmp_path / "raw")


def test_a_converted_adapter_does_not_replace_what_it_is_made_from(tmp_path):
    initialised("cross").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would replace its source"):
        convert_adapter(tmp_path, tmp_path / "." / "x" / "..")


def test_an_adapter_that_fits_the_stock_base_is_copied_and_replaces_an_older_record(tmp_path):
    initialised("cross").save_pretrained(tmp_path / "target")
    model = get_cntlora_model(
        Net(),
        LoraConfig(r=3, target_modules=TARGETS),
        CNTLoRAConfig(preserve_output=False),
        data(),
    )
    trained = train(model)
    model.save_pretrained(tmp_path / "plain")
    report = convert_adapter(tmp_path / "plain", tmp_path / "target")
    assert report.ranks == report.trained_ranks == model.cntlora_report.ranks
    assert not (tmp_path / "target" / RECORD_FILE).exists()
    assert close(PeftModel.from_pretrained(Net(), tmp_path / "target")(data()[0]), trained)


@pytest.mark.parametrize("method", ["cross", "pissa", "lava"])
def test_another_adapter_on_a_rewritten_base_is_warned_of_and_fits_no_other_model(method, tmp_path):
    model = initialised(method)
    config = (LavaConfig if method == "lava" else LoraConfig)(r=2, target_modules=["a"])
    with pytest.warns(UserWarning, match=r"rewritten.*adapter 'two' will fit no other model"):
        model.add_adapter("two", config)
    model.set_adapter("two")
    train(model)
    with pytest.raises(ValueError, match="'two' was added to a base that had been rewritten"):
        save_converted(model, tmp_path / "x", adapter_name="two")
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="fit a rewritten base model"):
        PeftModel.from_pretrained(Net(), tmp_path / "both" / "two")
    model.set_adapter("default")
    trained = train(model)
    save_converted(model, tmp_path / "first")
    assert close(PeftModel.from_pretrained(Net(), tmp_path / "first")(data()[0]), trained)


def test_a_copy_of_a_model_keeps_its_initialisation(tmp_path):
    model = copy.deepcopy(initialised("cross"))
    trained = train(model)
    save_converted(model, tmp_path)
    assert close(PeftModel.from_pretrained(Net(), tmp_path)(data()[0]), trained)


def test_in_this_process_peft_does_all_it_did(tmp_path):
    model = initialised("cross")
    trained = train(model)
    model.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(model)
    train(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(model(data()[0]), trained)
    assert all(torch.equal(get_peft_model_state_dict(model)[k], t) for k, t in state.items())
    model.add_weighted_adapter(["default"], [0.5], "mixed_in", combination_type="linear")
    model.delete_adapter("mixed_in")
    assert close(model.merge_and_unload()(data()[0]), trained)


def test_the_record_says_what_it_is_of(tmp_path):
    from safetensors import safe_open

    initialised("pissa").save_pretrained(tmp_path)
    with safe_open(str(tmp_path / RECORD_FILE), framework="pt") as file:
        header = json.loads(file.metadata()["header"])
        assert sorted(file.keys()) == sorted(f"{n}.{k}" for n in TARGETS for k in ("down", "up"))
    assert header["method"] == "pissa"
    assert header["layers"]["a"]["scaling"] == 2.0
    assert header["fingerprints"].keys() == set(TARGETS)
