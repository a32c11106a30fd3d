"""SDXL with what else a run can be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import ones

from cntlora_core.diffusion import job
from cntlora_core.diffusion.initialize import diffusion_attachment_points
from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
from cntlora_core.diffusion.sampler import LoRAUse
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.lora_file.algebra import LoRALayer
from cntlora_core.lora_file.families import SD15_FILES, SDXL_FILES, UNET
from cntlora_core.lora_file.names import TEXT_MODEL
from cntlora_core.lora_file.writing import read_lora_file, write_lora_file


@pytest.fixture
def train(tiny_sdxl, photo_folder, tmp_path):
    """One step, or as many as asked for, without class images."""

    def run(adapter: AdapterSettings, model: Path = tiny_sdxl, clip_skip: int = 1, **training):
        settings = JobSettings(
            model=str(model),
            subject=SubjectSettings(str(photo_folder), token="sks", class_name="dog"),
            output=OutputSettings(str(tmp_path / "out"), file_precision="float32"),
            prior=PriorSettings(prior_weight=0.0, cache=str(tmp_path / "cache")),
            adapter=adapter,
            training=TrainingSettings(
                **{"steps": 1, "learning_rate": 1e-2, "device": "cpu", **training}
            ),
            clip_skip=clip_skip,
        )
        return job.personalise(settings, overwrite=True)

    return run


def losses(result) -> list[float]:
    return [record["loss"] for record in result.history]


def random_lora(path: Path, parts: StableDiffusionParts) -> Path:
    """A LoRA of rank 2 on all attention."""
    generator = torch.Generator().manual_seed(4)
    layers = {
        point.name.replace(f".{TEXT_MODEL}", "."): LoRALayer(
            torch.randn(2, point.in_features, generator=generator),
            torch.randn(point.out_features, 2, generator=generator),
            1.0,
        )
        for point in diffusion_attachment_points(parts.networks, parts.family, PLAIN)
    }
    return write_lora_file(path, layers, family=parts.family.files)


PLAIN = AdapterSettings("lora", rank=2)


@pytest.mark.thorough
def test_gradient_checkpointing_and_a_stopped_text_encoder_compute_the_same(train):
    plain = train(PLAIN, steps=3, text_encoder_steps=2)
    checkpointed = train(PLAIN, steps=3, text_encoder_steps=2, gradient_checkpointing=True)
    assert losses(plain) == pytest.approx(losses(checkpointed), rel=1e-5)
    never = train(AdapterSettings("lora", rank=2, train_text_encoder=False), steps=1)
    assert losses(never) == pytest.approx(losses(plain)[:1], rel=1e-5)  # B is zero at first
    assert {name.split(".")[0] for name in read_lora_file(never.lora).layers} == {UNET}


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        (AdapterSettings("lora", "lava", rank=2), {}),
        (AdapterSettings("cross", rank=2, init_passes=1), {"precision": "bfloat16"}),
        (PLAIN, {"clip_skip": 2}),
    ],
    ids=["lava", "bfloat16", "clip_skip"],
)
def test_other_adapters_and_precisions(train, adapter, options):
    result = train(adapter, **options)
    names = {name.rpartition(".")[0] for name in read_lora_file(result.lora).layers}
    convolutions = {"unet.down_blocks.0.resnets.1", "unet.up_blocks.0.upsamplers.0"}
    assert (convolutions <= names) == (adapter.adapter == "lava")
    layers = {n.removesuffix(".self_attn") for n in names if n.startswith("text_encoder")}
    first = {"text_encoder.encoder.layers.0"} if "clip_skip" not in options else set()
    assert layers == first | {f"text_encoder_2.encoder.layers.{i}" for i in (0, 1)}


@pytest.mark.thorough
def test_a_run_goes_on_from_a_lora_of_its_family_alone(train, tiny_sdxl, tiny_model, tmp_path):
    given = random_lora(tmp_path / "xl.safetensors", load_stable_diffusion(str(tiny_sdxl)))
    before = read_lora_file(given)
    assert before.family == SDXL_FILES
    unread = {"text_encoder.encoder.layers.1.mlp.fc1": LoRALayer(ones(2, 32), ones(64, 2), 1.0)}
    write_lora_file(given, {**before.layers, **unread}, family=SDXL_FILES)  # as sd-scripts has it
    result = train(AdapterSettings(from_lora=str(given)))
    after = read_lora_file(result.lora).layers
    assert after.keys() == before.layers.keys()
    moved = [float((after[n].delta() - x.delta()).norm()) for n, x in before.layers.items()]
    assert min(moved) > 0

    with pytest.raises(ValueError, match=r"for Stable Diffusion XL, and the model is a .* 1.5"):
        train(AdapterSettings(from_lora=str(given)), model=tiny_model)
    path = random_lora(tmp_path / "small.safetensors", load_stable_diffusion(str(tiny_model)))
    with pytest.raises(ValueError, match=r"for Stable Diffusion 1.5, and the model is a .* XL"):
        train(AdapterSettings(from_lora=str(path)))
    assert LoRAUse(given).check(SDXL_FILES) == ()
    with pytest.raises(ValueError, match="input_blocks"):
        LoRAUse(given).check(SD15_FILES)
