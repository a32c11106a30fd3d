"""The model in memory after training against stock pipelines that load the file."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel

from cntlora_core.cli import main
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.diffusion import export
from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.diffusion.sampler import LoRAUse, sample
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    OutputSettings,
    SamplingSettings,
    SchedulerName,
)
from cntlora_core.lora_file.writing import collect_adapter, read_lora_file, total_relative_error

from ..conftest import prediction, relative

ADAPTERS = {
    "cross": AdapterSettings(rank=4, alpha=8, init_passes=1),
    "cross-fixed-qr": AdapterSettings(
        rank=4,
        alpha=2,
        init_passes=1,
        cntlora=CNTLoRAConfig(rank_budget="fixed", factorization="qr"),
    ),
    "self-stays": AdapterSettings(
        method="self",
        rank=4,
        alpha=8,
        init_passes=1,
        cntlora=CNTLoRAConfig(preserve_output=False),
    ),
    "lora": AdapterSettings(method="lora", rank=4, alpha=8),
    "unet-only": AdapterSettings(rank=4, alpha=8, init_passes=1, train_text_encoder=False),
}


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("cross", "lora") else pytest.mark.thorough)
        for n in ADAPTERS
    ],
)
def test_a_stock_pipeline_with_the_file_equals_the_trained_model(train, tiny_model, name, layout):
    result, kept = train(ADAPTERS[name], layout=layout)
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_model), safety_checker=None)
    before = prediction(pipeline.unet, pipeline.text_encoder)
    pipeline.load_lora_weights(str(result.lora))
    after = prediction(pipeline.unet, pipeline.text_encoder)
    assert relative(after, kept["prediction"]) < 1e-4
    assert relative(after, before) > 1e-2
    points = {n.split(".")[0] for n in result.export.ranks}
    assert points == ({"unet"} if name == "unet-only" else {"unet", "text_encoder"})


def test_a_file_is_truncated_where_that_loses_little(train, tiny_model, monkeypatch):
    exact, kept = train(ADAPTERS["cross"], keep_state=False)
    exact_layers = read_lora_file(exact.lora).layers
    (exact.folder / "run.json").unlink()
    monkeypatch.setattr(export, "TRUNCATION_BOUND", 1.0)
    short, _ = train(ADAPTERS["cross"], compress=True, keep_state=False)
    file = read_lora_file(short.lora)
    assert short.export.ranks == short.export.trained_ranks
    assert {n: layer.rank for n, layer in file.layers.items()} == short.export.ranks
    error = total_relative_error(file.layers, exact_layers)
    assert short.export.relative_error == pytest.approx(error, rel=1e-3)
    assert short.export.truncation_error == pytest.approx(error, rel=1e-3)
    assert 0 < error < 1
    assert file.metadata["cntlora.export"] == short.export.summary() in short.notes
    assert "truncated to the trained ranks" in short.export.summary()
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_model), safety_checker=None)
    before = prediction(pipeline.unet, pipeline.text_encoder)
    pipeline.load_lora_weights(str(short.lora))
    after = prediction(pipeline.unet, pipeline.text_encoder)
    assert relative(after, kept["prediction"]) < relative(before, kept["prediction"])

    monkeypatch.setattr(export, "TRUNCATION_BOUND", 0.9 * error)
    (short.folder / "run.json").unlink()
    whole, _ = train(ADAPTERS["cross"], compress=True, keep_state=False)
    assert whole.export.ranks == exact.export.ranks != short.export.ranks
    assert whole.export.relative_error < 1e-6
    assert whole.export.truncation_error == pytest.approx(error, rel=1e-3)
    assert "truncation would lose" in read_lora_file(whole.lora).metadata["cntlora.export"]


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("name", ["cross", pytest.param("lora", marks=pytest.mark.thorough)])
def test_half_precision_pipelines_hold_what_was_learned(
    train, tiny_model, monkeypatch, name, layout
):
    monkeypatch.setattr(export, "TRUNCATION_BOUND", 0.0)
    defaults = OutputSettings("out")
    result, kept = train(
        ADAPTERS[name],
        layout=layout,
        file_precision=defaults.file_precision,
        compress=defaults.compress,
    )
    exact = kept["exact"]
    assert result.export.relative_error < 1e-3
    for dtype, limit in ((torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(tiny_model), safety_checker=None, torch_dtype=dtype
        )
        unet, text_encoder = pipeline.unet, pipeline.text_encoder
        adapter = "default"
        if layout == "peft":
            unet = PeftModel.from_pretrained(unet, result.lora / "unet").to(dtype)
            text_encoder = PeftModel.from_pretrained(text_encoder, result.lora / "text_encoder")
            text_encoder = text_encoder.to(dtype)
        else:
            adapter = "default_0"
            pipeline.load_lora_weights(str(result.lora))
        loaded = collect_adapter(unet, adapter)
        loaded |= collect_adapter(text_encoder, adapter, prefix="text_encoder")
        assert 0 < total_relative_error(loaded, exact) < limit


def test_parts_that_were_sampled_from_keep_no_lora(train, tiny_model):
    result, _ = train(ADAPTERS["cross"])
    parts = load_stable_diffusion(tiny_model)
    settings = SamplingSettings(steps=2, resolution=32)
    before = sample(parts, ["a dog"], (), settings)[0].tobytes()
    with_lora = sample(parts, ["a dog"], [result.lora], settings)[0].tobytes()
    again = sample(parts, ["a dog"], [result.lora], settings)[0].tobytes()
    after = sample(parts, ["a dog"], (), settings)[0].tobytes()
    assert with_lora == again != before == after


def test_metadata_tells_the_method_and_no_folder_of_the_trainer(train, tmp_path, photo_folder):
    result, _ = train(ADAPTERS["cross"])
    metadata = read_lora_file(result.lora).metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["ss_base_model_version"] == "sd_v1"
    text = repr(metadata)
    assert "cross" in text
    assert str(tmp_path) not in text
    assert str(photo_folder) not in text


def test_sampling_with_files_strengths_and_seeds(train, tiny_model):
    result, _ = train(ADAPTERS["cross"])
    settings = SamplingSettings(steps=3, resolution=32, seed=4)

    def generated(*loras):
        return [p.tobytes() for p in sample(tiny_model, ["a dog", "sks dog"], loras, settings)]

    base = generated()
    assert generated(LoRAUse(result.lora, 0.0)) == base
    assert generated(str(result.lora)) != base
    assert generated(f"{result.lora}:0.5") != generated(result.lora)
    # Each picture has its own seed: generated alone it is the same.
    single = dataclasses.replace(settings, seed=5, batch_size=1)
    alone = sample(tiny_model, ["sks dog"], (), single)
    difference = [abs(a - b) for a, b in zip(alone[0].tobytes(), base[1], strict=True)]
    assert max(difference) <= 1


def test_sampling_with_a_missing_or_foreign_file_is_refused(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        sample(tiny_model, ["a dog"], [tmp_path / "nothing.safetensors"])
    with pytest.raises(ValueError, match="must be a number"):
        LoRAUse.parse("dog.safetensors:strong")


def test_metadata_says_what_the_model_predicts(train, tiny_model):
    file = tiny_model / "scheduler" / "scheduler_config.json"
    before = file.read_text("utf-8")
    try:
        file.write_text(json.dumps({**json.loads(before), "prediction_type": "v_prediction"}))
        result, kept = train(ADAPTERS["unet-only"])
    finally:
        file.write_text(before)
    assert kept["trainer"]._batch_loss._scheduler.config["prediction_type"] == "v_prediction"
    assert read_lora_file(result.lora).metadata["modelspec.prediction_type"] == "v"


def test_a_scheduler_that_there_is_not_is_refused_before_anything_is_loaded(capsys):
    assert "heun" in get_args(SchedulerName)
    with pytest.raises(ValueError, match=r"scheduler must be one of pndm, .*unipc; got 'eular'"):
        SamplingSettings(scheduler="eular")  # pyright: ignore[reportArgumentType]
    asked = ["sample", "--model", "none", "--prompt", "a", "--output", "o", "--scheduler", "eular"]
    with pytest.raises(SystemExit):
        main(asked)
    assert "dpm++_karras" in capsys.readouterr().err
