"""LAVA in the image pipeline: training, the file, and diffusers with the file."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.diffusion import export
from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.diffusion.sampler import LoRAUse, apply_lora_files
from cntlora_core.diffusion.settings import (
    AdapterSettings,
)
from cntlora_core.lava.cp import decompose
from cntlora_core.lora_file.writing import read_lora_file

from ..conftest import prediction, relative

FEW = {"rank": 3, "alpha": 6, "adapter": "lava", "init_passes": 1}
ADAPTERS = {
    "cross": AdapterSettings(**FEW),
    "fixed": AdapterSettings(**FEW, cntlora=CNTLoRAConfig(rank_budget="fixed")),
    "plain": AdapterSettings(**FEW, method="lora", orthogonality=0.0),
}


@pytest.mark.parametrize(
    "name",
    [
        "cross",
        pytest.param("fixed", marks=pytest.mark.thorough),
        pytest.param("plain", marks=pytest.mark.thorough),
    ],
)
def test_the_file_is_what_was_trained(train, tiny_model, tmp_path, name):
    adapter = ADAPTERS[name]
    result, kept = train(adapter)
    pipeline = load_stable_diffusion(tiny_model).pipeline()
    stock = prediction(pipeline.unet, pipeline.text_encoder)
    assert relative(stock, kept["prediction"]) > 1e-3
    apply_lora_files(pipeline, [LoRAUse(result.lora)])
    assert relative(prediction(pipeline.unet, pipeline.text_encoder), kept["prediction"]) < 1e-4
    layers = read_lora_file(result.lora).layers
    kernels = {n for n, layer in layers.items() if layer.mid is not None}
    for convolution in ("unet.down_blocks.0.resnets.0.conv1", "unet.conv_in"):
        # Where an initialisation was subtracted the mid is contracted: its factors nearly cancel.
        # Under a shared budget some convolutions are initialised as plain LAVA.
        if name != "cross":
            assert (convolution in kernels) == (name == "plain")
        side = 1 if convolution in kernels else 3
        assert layers[convolution].down.shape[2:] == (side, side)
    assert "text_encoder.encoder.layers.0.self_attn.q_proj" in layers
    for layer in (layers[n] for n in kernels):
        off_diagonal = layer.mid[~torch.eye(layer.rank, dtype=torch.bool)]
        assert not off_diagonal.any()
    assert result.history[0]["loss"] > 0
    if name == "cross":
        report = result.initialization
        assert 0 < report["relative_error"] < 1
        assert any("convolutions miss" in note for note in result.notes)


@pytest.mark.thorough
def test_layouts_that_know_no_mid_hold_the_same_change(train, tiny_model):
    result, kept = train(ADAPTERS["fixed"], layout="diffusers")
    assert result.export.relative_error < 1e-6
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_model), safety_checker=None)
    pipeline.load_lora_weights(str(result.lora))
    found = prediction(pipeline.unet, pipeline.text_encoder)
    assert relative(found, kept["prediction"]) < 1e-4

    again, _ = train(ADAPTERS["fixed"], layout="peft", resume=True)
    parts = load_stable_diffusion(tiny_model)
    unet = PeftModel.from_pretrained(parts.unet, again.lora / "unet")
    text_encoder = PeftModel.from_pretrained(parts.text_encoder, again.lora / "text_encoder")
    assert relative(prediction(unet, text_encoder), kept["prediction"]) < 1e-4


@pytest.mark.thorough
def test_compressed_and_rounded_files_say_what_that_cost(train, monkeypatch):
    monkeypatch.setattr(export, "TRUNCATION_BOUND", 1.0)
    exact, _ = train(ADAPTERS["fixed"], name="exact")
    layers = read_lora_file(exact.lora).layers
    size = sum(layer.delta().norm() ** 2 for layer in layers.values())

    def lost(result) -> float:
        stored = read_lora_file(result.lora).layers
        squares = sum(
            (stored[n].delta() - layer.delta()).norm() ** 2 for n, layer in layers.items()
        )
        return float((squares / size) ** 0.5)

    short, _ = train(
        ADAPTERS["fixed"], name="short", compress=True, file_precision="bfloat16", resume=True
    )
    assert short.export.ranks == short.export.trained_ranks
    assert 1e-3 < short.export.relative_error < 1
    assert any("relative error" in note for note in short.notes)
    assert short.export.relative_error == pytest.approx(lost(short), rel=0.05)
    for precision, limit in (("float16", 1e-3), ("bfloat16", 8e-3)):
        half, _ = train(ADAPTERS["fixed"], name=precision, file_precision=precision, resume=True)
        assert lost(half) < limit
        assert half.export.relative_error == pytest.approx(lost(half), rel=0.05)
        assert half.export.ranks == exact.export.ranks | {"unet.conv_out": 4}  # its outputs


class Stop:
    def __call__(self, stage, done, total, values):
        if stage == "training" and done == 2:
            raise KeyboardInterrupt


@pytest.mark.thorough
def test_a_resumed_run_equals_an_uninterrupted_one(train, tmp_path):
    whole, _ = train(ADAPTERS["fixed"], steps=4)
    again = {"output": str(tmp_path / "again")}
    with pytest.raises(KeyboardInterrupt):
        train(ADAPTERS["fixed"], steps=4, reporter=Stop(), **again)
    resumed, _ = train(ADAPTERS["fixed"], steps=4, resume=True, **again)
    a, b = load_file(whole.lora), load_file(resumed.lora)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_term_is_part_of_the_loss(train):
    strong = dataclasses.replace(ADAPTERS["fixed"], orthogonality=5.0)
    result, kept = train(strong, steps=2)
    first, second = result.history
    assert first["loss"] == pytest.approx(first["instance_loss"], abs=1e-4)  # orthonormal at first
    assert second["loss"] > second["instance_loss"] + 1e-6
    names = {name.rsplit(".", 1)[1] for name in kept["trainer"].parameters}
    assert names == {"U", "V", "Y", "X"}


def test_attention_only(train):
    result, _ = train(dataclasses.replace(ADAPTERS["plain"], convolutions=False))
    layers = read_lora_file(result.lora).layers
    assert all(layer.mid is None and layer.down.ndim == 2 for layer in layers.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "pissa"}, "use cross, self, shift or lora"),
        ({"cntlora": CNTLoRAConfig(rank_budget="parameters")}, "counts a LoRA's parameters"),
        ({"orthogonal_factors": ("W",)}, "one of U, V, Y, X"),
        ({"adapter": "loha"}, "one of lora, lava"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AdapterSettings(**{**FEW, **options})


def test_the_command_line_takes_it(monkeypatch):
    from cntlora_core import cli

    seen = {}
    monkeypatch.setattr(cli.Train, "run", lambda self, reporter: seen.update(adapter=self.adapter))
    arguments = ["train", "--model", "m", "--images", "i", "--token", "a", "--class-name", "b"]
    arguments += ["--output", "o", "--adapter", "lava", "--rank", "4", "--method", "self"]
    arguments += ["--orthogonality", "0.2", "--orthogonal-factors", "U", "V", "--no-convolutions"]
    assert cli.main(arguments) == 0
    adapter = seen["adapter"]
    assert (adapter.adapter, adapter.rank, adapter.convolutions) == ("lava", 4, False)
    assert adapter.orthogonal_factors == ("U", "V")


def test_a_delta_of_one_term_survives_the_whole_way():
    """A check of the checks: the file's mid form is the sum of rank-1 tensors."""
    from cntlora_core.lava.factors import LavaFactors
    from cntlora_core.lava.image_file import lora_layer

    torch.manual_seed(2)
    factors = LavaFactors(
        torch.randn(6, 2), torch.randn(5, 2), (torch.randn(3, 2), torch.randn(2, 2)), 0.5
    )
    torch.testing.assert_close(lora_layer(factors).delta(), factors.delta())
    again = decompose(torch.eye(6), lora_layer(factors).delta(), 2)
    assert again.error < 1e-4
