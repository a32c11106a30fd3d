"""SDXL, from photos to a file that stock tools load."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from cntlora_core.diffusion import job
from cntlora_core.diffusion.export import export_lora
from cntlora_core.diffusion.family import SDXL
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.lora_file.families import SDXL_FILES
from cntlora_core.lora_file.writing import collect_adapter, read_lora_file

from ...conftest import relative
from .conftest import networks_of, prediction


@pytest.fixture
def settings(tiny_sdxl, photo_folder, tmp_path) -> JobSettings:
    held_out = tmp_path / "held out"
    held_out.mkdir()
    (photo_folder / "3.png").rename(held_out / "3.png")
    return JobSettings(
        model=str(tiny_sdxl),
        subject=SubjectSettings(
            images=str(photo_folder), token="sks", class_name="dog", held_out=str(held_out)
        ),
        output=OutputSettings(str(tmp_path / "out"), file_precision="float32", compress=False),
        prior=PriorSettings(num_class_images=2, class_steps=2, cache=str(tmp_path / "cache")),
        adapter=AdapterSettings(rank=4, alpha=8, init_passes=1),
        training=TrainingSettings(
            steps=2, learning_rate=1e-2, save_every=1, held_out_every=2, device="cpu",
            caption_dropout=0.1,
        ),
    )  # fmt: skip


@pytest.fixture
def stock(tiny_sdxl):
    return StableDiffusionXLPipeline.from_pretrained(str(tiny_sdxl), add_watermarker=False)


def personalise(settings, monkeypatch, **options):
    """The result of a run, and what its networks predict at its start and at its end."""
    kept = {}
    run, finish = job.SubjectTrainer.run, job._finish

    def keep_initial(trainer, **more):
        kept["initial"] = prediction(trainer.networks)
        run(trainer, **more)

    def keep(trainer, *rest):
        kept["prediction"] = prediction(trainer.networks)
        kept["trainer"] = trainer
        return finish(trainer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(job.SubjectTrainer, "run", keep_initial)
        patched.setattr(job, "_finish", keep)
        return job.personalise(settings, **options), kept


@pytest.mark.thorough
def test_a_run_goes_on_where_it_stopped_and_its_file_is_right_in_every_layout(
    settings, stock, tmp_path, monkeypatch
):
    base = prediction(networks_of(stock))

    def stop(stage, done, _total, _values):
        if stage == "training" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.personalise(settings, reporter=stop)
    resumed, _ = personalise(settings, monkeypatch, resume=True)
    other = dataclasses.replace(settings.output, output=str(tmp_path / "whole"))
    whole, kept = personalise(dataclasses.replace(settings, output=other), monkeypatch)
    one, two = load_file(resumed.lora), load_file(whole.lora)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert "held_out_loss" in whole.history[-1]
    assert relative(kept["initial"], base) < 1e-4
    assert relative(kept["prediction"], base) > 1e-2

    with safe_open(whole.lora, framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.resolution"] == "32x32"
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    modules = {name.split(".")[0] for name in one}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k" in modules
    assert "lora_unet_output_blocks_2_1_transformer_blocks_0_attn1_to_out_0" in modules
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q" in modules
    assert "lora_te2_text_model_encoder_layers_1_self_attn_q_proj" in modules
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in modules
    assert not any(
        "te1_text_model_encoder_layers_1" in name for name in modules
    )  # nothing reads it
    moved = {
        name: float((p.detach() - kept["trainer"]._initial[p]).norm())
        for name, p in kept["trainer"].parameters.items()
    }
    assert all(moved.values())

    for layout in ("kohya", "diffusers", "peft"):
        path = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        output = dataclasses.replace(other, layout=layout)
        export_lora(kept["trainer"].networks, kept["trainer"].plan, path, output, {}, SDXL_FILES)
        read = read_lora_file(path)
        assert read.family == SDXL_FILES
        assert {n.split(".")[0] for n in read.layers} == {"unet", *SDXL.text_encoders}
        if layout == "peft":
            networks = {
                name: PeftModel.from_pretrained(copy.deepcopy(network), path / name)
                for name, network in networks_of(stock).items()
            }
            found = {}
            for name, network in networks.items():
                found |= collect_adapter(network, prefix=name)
            assert found.keys() == read.layers.keys()
            assert relative(prediction(networks), kept["prediction"]) < 1e-4
            continue
        stock.load_lora_weights(str(path))
        assert relative(prediction(networks_of(stock)), kept["prediction"]) < 1e-4
        stock.unload_lora_weights()
    assert torch.equal(prediction(networks_of(stock)), base)
