"""Class images, samples while training, and every other option of a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.diffusion import job, material
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.settings import PriorSettings
from cntlora_core.diffusion.stages import encode_class_images
from cntlora_core.lora_file.reading import read_lora_file

from ..conftest import StopAt, change, losses


@pytest.mark.thorough
def test_class_images_and_latents_are_reused_and_topped_up(settings):
    shutil.rmtree(settings.prior.cache)
    first = StopAt(-1)
    personalise(change(settings, "training", steps=1), reporter=first)
    again = StopAt(-1)
    personalise(change(settings, "training", steps=1, seed=7), overwrite=True, reporter=again)
    assert "generating class images" in first.stages
    assert "generating class images" not in again.stages
    folder = next((Path(settings.prior.cache) / "class_images").iterdir())
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    more = change(change(settings, "training", steps=1), "prior", num_class_images=3)
    personalise(more, overwrite=True)
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert len(after) == 3
    assert before.items() <= after.items()


def test_given_class_images_are_used_and_none_with_weight_zero(settings, tmp_path):
    folder = tmp_path / "dogs"
    folder.mkdir()
    Image.new("RGB", (24, 32), "blue").save(folder / "x.png")
    settings = dataclasses.replace(settings, prior=given_images(settings, folder))
    result = personalise(settings)
    assert all(record["prior_loss"] > 0 for record in result.history)
    assert any("1 of 1 class images have fewer than 32 x 32 pixels" in n for n in result.notes)
    without = change(settings, "prior", prior_weight=0.0)
    result = personalise(without, overwrite=True)
    assert all(record["prior_loss"] == 0 for record in result.history)


def test_given_class_images_are_held_at_the_training_resolution(settings, tmp_path, monkeypatch):
    folder = tmp_path / "large"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((400, 320), 20.0 + i).save(folder / f"{i}.png")
    held = []

    def keep(parts, subject, photos, **options):
        held.extend(photo.image for photo in photos.photos)
        return encode_class_images(parts, subject, photos, **options)

    monkeypatch.setattr(material, "encode_class_images", keep)
    settings = change(settings, "subject", resolution=32)
    result = personalise(dataclasses.replace(settings, prior=given_images(settings, folder)))
    assert [image.size for image in held] == [(40, 32)] * 3
    assert not any("class images have fewer" in note for note in result.notes)
    assert sum(len(image.tobytes()) for image in held) == 3 * 40 * 32 * 3


def given_images(settings, folder: Path) -> PriorSettings:
    return PriorSettings(class_images=str(folder), cache=settings.prior.cache)


MANY = {"gradient_accumulation": 2, "batch_size": 2, "min_snr_gamma": 5.0}
WARM = {"lr_schedule": "constant_with_warmup", "lr_warmup": 2}
LOOSE = CNTLoRAConfig(preserve_output=False, damping=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {
            "training": {**MANY, **WARM},
            "adapter": {"train_text_encoder": False},
            "subject": {"flip": True},
        },
        pytest.param(
            {"training": {"precision": "bfloat16"}, "adapter": {"cntlora": LOOSE}},
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"training": {"precision": "float16"}, "output": {"compress": False}},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_options_run(settings, options):
    settings = change(settings, "training", steps=2)
    for part, values in options.items():
        settings = change(settings, part, **values)
    result = personalise(settings)
    assert len(result.history) == 2
    assert result.lora.exists()


@pytest.mark.parametrize(
    "precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.thorough)]
)
def test_photos_are_encoded_in_float32_whatever_the_precision(settings, monkeypatch, precision):
    monkeypatch.setattr(job, "_finish", lambda trainer, *rest: trainer.data.photos)
    settings = change(change(settings, "prior", prior_weight=0.0), "training", steps=1)
    exact: Any = personalise(settings)
    latents: Any = personalise(change(settings, "training", precision=precision), overwrite=True)
    for kind in ("mean", "std"):
        encoded, expected = getattr(latents, kind), getattr(exact, kind)
        assert {one.dtype for one in encoded} == {torch.float32}
        assert all(map(torch.equal, encoded, expected))


def test_gradient_checkpointing_trains_every_adapter(settings, monkeypatch):
    monkeypatch.setattr(job, "_finish", lambda trainer, *rest: trainer)
    checkpointed = change(settings, "training", steps=1, gradient_checkpointing=True)
    trainer: Any = personalise(checkpointed)
    # Where an initialisation leaves the up matrix at zero, the down matrix has no gradient yet.
    ups = {n: p for n, p in trainer.parameters.items() if n.endswith(".up")}
    moments = {n: trainer.optimizer.state.get(p) for n, p in ups.items()}
    without = [n for n, kept in moments.items() if not kept or not kept["exp_avg"].any()]
    assert without == []


def test_samples_are_generated_while_training(settings):
    prompts = ("a photo of sks dog", "a photo of sks dog in the snow")
    settings = change(settings, "training", sample_prompts=prompts, sample_every=4, sample_steps=2)
    result = personalise(settings)
    names = sorted(p.name for p in (result.folder / "samples").iterdir())
    assert [n[:6] for n in names] == ["000004", "000004", "000006", "000006"]


def test_samples_of_prompts_that_look_alike_or_are_the_same_are_all_kept(settings):
    prompts = ("a dog!", "a dog?", "a_dog", "a dog", "A dog", "a dog")
    settings = change(
        settings, "training", steps=1, sample_prompts=prompts, sample_steps=1, save_every=1
    )
    result = personalise(settings)
    names = [p.name.casefold() for p in (result.folder / "samples").iterdir()]
    assert len(set(names)) == len(prompts)


def test_generating_samples_does_not_change_the_training(settings):
    plain = personalise(settings)
    settings = change(
        settings, "training", sample_prompts=("a dog",), sample_every=2, sample_steps=2
    )
    assert losses(personalise(settings, overwrite=True)) == losses(plain)


def test_a_model_of_zero_terminal_snr_is_trained_and_sampled(settings, tmp_path):
    """With Min-SNR weights, class images and previews; all of it is finite."""
    model = tmp_path / "zero snr"
    shutil.copytree(settings.model, model)
    file = model / "scheduler" / "scheduler_config.json"
    changed = {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changed), "utf-8")
    settings = dataclasses.replace(settings, model=str(model))
    settings = change(
        settings, "training", steps=6, batch_size=4, min_snr_gamma=5.0, save_every=40,
        sample_prompts=("a photo of sks dog",), sample_steps=3,
    )  # fmt: skip
    result = personalise(settings)
    assert np.isfinite(losses(result)).all()
    made = [
        *(result.folder / "samples").iterdir(),
        *Path(str(settings.prior.cache)).rglob("0*.png"),
    ]
    assert len(made) == 1 + 2 + 2  # a sample, and the class images of both models
    for path in made:
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 0
    record = json.loads((result.folder / "run.json").read_text("utf-8"))
    assert record["model"]["prediction_type"] == "v_prediction"
    assert record["identity"]["model"].endswith("-v_prediction-zero-snr")


def test_what_the_model_predicts_can_be_said(settings):
    """A run under another objective is another run."""
    told = dataclasses.replace(settings, prediction_type="v_prediction")
    first = personalise(change(told, "training", steps=2))
    assert read_lora_file(first.lora).metadata["modelspec.prediction_type"] == "v"
    with pytest.raises(ValueError, match=r"these differ: .*identity\.model"):
        personalise(change(settings, "training", steps=3), resume=True)
    personalise(change(told, "training", steps=3), resume=True)
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, v_prediction"):
        dataclasses.replace(settings, prediction_type="v")
