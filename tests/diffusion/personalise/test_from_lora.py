"""Going on from a LoRA file: whoever wrote it, its layers, ranks and alphas are trained further."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from cntlora_core.cli import main
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.presets import PAPER
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.lora_file.reading import read_lora_file
from cntlora_core.lora_file.writing import LoRALayer, LoRALayers, write_lora_file
from cntlora_core.methods import InitializationRequest, get_method

from ..conftest import StopAt, change, losses
from .test_snapshots import same_lora

ENDINGS = {
    "unet": ("attn2.to_v", "attn1.to_out.0", "ff.net.2", "proj_in", "resnets.0.conv1"),
    "text_encoder": ("q_proj", "fc1"),
}
"""What kohya's and LyCORIS' LoRAs change too: linear maps, 1x1 and 3x3 kernels."""


@pytest.fixture(scope="module")
def layers(tiny_model: Path) -> LoRALayers:
    """A LoRA with layers of every kind, of ranks and alphas that differ."""
    models = {
        "unet": UNet2DConditionModel.from_pretrained(tiny_model / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_model / "text_encoder"),
    }
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    found: LoRALayers = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            if not name.endswith(ENDINGS[part]):
                continue
            rank = 1 + len(found) % 3
            name = f"{part}.{name.removeprefix('text_model.')}"
            if isinstance(module, nn.Conv2d):
                down = random(rank, module.in_channels, *module.kernel_size)
                found[name] = LoRALayer(down, random(module.out_channels, rank, 1, 1), 0.5 * rank)
            elif isinstance(module, nn.Linear):
                down = random(rank, module.in_features)
                found[name] = LoRALayer(down, random(module.out_features, rank), 0.5 + rank)
    assert any("conv1" in name for name in found)
    return found


def with_mid(layers: LoRALayers) -> LoRALayers:
    """The same with a convolution in CP form, which only kohya's layout has."""
    name = next(name for name in layers if name.endswith("conv1"))
    rank, channels = layers[name].down.shape[:2]
    generator = torch.Generator().manual_seed(6)
    down, mid = (
        torch.randn(*shape, generator=generator)
        for shape in ((rank, channels, 1, 1), (rank, rank, 3, 3))
    )
    return {**layers, name: LoRALayer(down, layers[name].up, 1.0, mid)}


@pytest.fixture
def exact(plain):
    """One step, files in float32."""
    plain = change(plain, "adapter", rank=AdapterSettings.rank, alpha=None, method="from_lora",
                   from_lora="set below")  # fmt: skip
    return change(change(plain, "output", file_precision="float32"), "training", steps=1)


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_a_file_of_any_layout_is_where_the_training_begins(exact, layers, tmp_path, layout):
    layers = with_mid(layers) if layout == "kohya" else layers
    path = tmp_path / ("theirs" if layout == "peft" else "theirs.safetensors")
    write_lora_file(path, layers, layout=layout)
    exact = change(exact, "adapter", from_lora=str(path))
    result = personalise(change(exact, "training", learning_rate=0.0))
    found = read_lora_file(result.lora).layers
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert found[name].rank == layer.rank
        assert torch.allclose(found[name].delta(), layer.delta(), atol=1e-6), name
    trained = read_lora_file(personalise(exact, overwrite=True).lora).layers
    unchanged = [n for n in layers if torch.allclose(trained[n].delta(), layers[n].delta())]
    assert unchanged == []


def test_a_run_of_ours_goes_on_as_from_lora_and_resumes(exact, plain, layers, tmp_path):
    first = personalise(change(plain, "output", output=str(tmp_path / "first")))
    settings = change(exact, "adapter", from_lora=str(first.folder))
    settings = change(settings, "training", learning_rate=0.0)
    again = personalise(settings)
    assert again.lora.name == "sks-dog-from_lora.safetensors"
    with safe_open(again.lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["cntlora.method"] == "from_lora"
    assert str(tmp_path) not in json.dumps(metadata)
    record = json.loads((again.folder / "run.json").read_text("utf-8"))
    assert record["settings"]["adapter"]["from_lora"] == str(first.folder)
    before, after = (read_lora_file(path).layers for path in (first.lora, again.lora))
    assert all(torch.allclose(before[n].delta(), after[n].delta(), atol=1e-6) for n in before)

    path, moved = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_lora_file(path, layers)
    settings = change(change(exact, "adapter", from_lora=str(path)), "training", steps=3)
    whole = personalise(change(settings, "output", output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, overwrite=True, reporter=StopAt(2))
    with pytest.raises(ValueError, match=r"identity\.from_lora"):
        personalise(change(settings, "adapter", from_lora=str(first.lora)), resume=True)
    shutil.move(path, moved)
    resumed = personalise(change(settings, "adapter", from_lora=str(moved)), resume=True)
    assert losses(resumed) == losses(whole)
    assert same_lora(resumed.lora, whole.lora)


def test_the_papers_preset_leaves_its_rank_and_its_run_goes_on(exact, layers, tmp_path):
    path = tmp_path / "theirs.safetensors"
    write_lora_file(path, layers)
    exact = change(change(exact, "adapter", from_lora=str(path)), "training", steps=2)
    with pytest.raises(KeyboardInterrupt):
        personalise(change(exact, "adapter", rank=PAPER["adapter"]["rank"]), reporter=StopAt(1))
    assert len(personalise(exact, resume=True).history) == 2
    with pytest.raises(ValueError, match="leave rank out"):
        personalise(change(exact, "adapter", rank=77), overwrite=True)


def test_what_a_lora_lacks_stays_as_it_is(exact, layers, tmp_path):
    path = tmp_path / "unet.safetensors"
    unet = {name: layer for name, layer in layers.items() if name.startswith("unet.")}
    name = next(name for name in unet if name.endswith("to_v"))
    idle = {
        name.replace("down_blocks.0", "down_blocks.9"): LoRALayer(
            unet[name].down, torch.zeros_like(unet[name].up), 1.0
        )
    }
    assert not idle.keys() & unet.keys()
    write_lora_file(path, unet | idle)  # idle: a layer that this model lacks, and that does nothing
    result = personalise(change(exact, "adapter", from_lora=str(path)))
    assert read_lora_file(result.lora).layers.keys() == unet.keys()
    assert any("leaves the text encoder as it is" in note for note in result.notes)


def with_layers(change_of):
    return lambda path, layers: write_lora_file(path, change_of(layers))


def wider(layers: LoRALayers) -> LoRALayers:
    name, layer = next(item for item in layers.items() if item[0].endswith("to_v"))
    return {**layers, name: LoRALayer(torch.ones(layer.rank, 7), layer.up, 1.0)}


def elsewhere(layers: LoRALayers) -> LoRALayers:
    layer = next(iter(layers.values()))
    return {**layers, "unet.down_blocks.7.attentions.0.proj_in": layer}


def text_alone(layers: LoRALayers) -> LoRALayers:
    return {name: layer for name, layer in layers.items() if name.startswith("text_encoder.")}


def switched_off(path: Path, layers: LoRALayers) -> None:
    write_lora_file(path, layers)
    zeros = {name: torch.zeros(()) for name in load_file(path) if name.endswith(".alpha")}
    save_file(load_file(path) | zeros, path)


def loha(path: Path, _layers: LoRALayers) -> None:
    save_file({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}, path)


@pytest.mark.parametrize(
    ("write", "adapter", "words"),
    [
        (with_layers(dict), {"rank": 4}, r"rank=4, but the layers of .* ranks 1 to 3"),
        (with_layers(dict), {"train_text_encoder": False}, r"layers of the text encoder.* lost"),
        (with_layers(wider), {}, r"changes 7 -> \d+ features at .* another model"),
        (with_layers(elsewhere), {}, r"1 layers that this model has not, as unet.down_blocks.7"),
        (switched_off, {}, "has alpha 0"),
        (with_layers(text_alone), {}, "nothing of the UNet"),
        (loha, {}, "not a plain LoRA but LoHa"),
        (lambda path, _layers: path.write_bytes(b"x" * 99), {}, "no safetensors file"),
        (lambda path, _layers: None, {}, "there is no LoRA"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(exact, layers, tmp_path, write, adapter, words):
    path = tmp_path / "theirs.safetensors"
    write(path, layers)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        personalise(change(exact, "adapter", from_lora=str(path), **adapter))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"from_lora": "x", "method": "pissa"}, "give one of the two"),
        ({"from_lora": "x", "alpha": 8.0}, "leave alpha out"),
        ({"from_lora": "x", "adapter": "lava"}, "not with adapter='lava'"),
        ({"method": "from_lora"}, "name its file"),
    ],
)
def test_settings_that_contradict_a_file_are_refused(adapter, words):
    with pytest.raises(ValueError, match=words):
        AdapterSettings(**adapter)


def test_the_flag_is_the_method_and_other_models_are_told_that_there_is_no_file(capsys):
    assert AdapterSettings(from_lora="x").method == "from_lora"
    assert AdapterSettings(**vars(AdapterSettings(from_lora="x"))).method == "from_lora"
    arguments = ["train", "--model", "m", "--images", "i", "--output", "o", "--method", "eva"]
    assert main([*arguments, "--from-lora", "x"]) == 2
    assert "give one of the two" in capsys.readouterr().err
    method = get_method("from_lora")
    assert method.plan is not None
    with pytest.raises(ValueError, match="goes on from a LoRA file"):
        method.plan(InitializationRequest(nn.Linear(2, 2), [], 1, 1.0))
