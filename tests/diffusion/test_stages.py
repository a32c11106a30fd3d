"""A personalisation done stage by stage: the same as in one go, and found again by what it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cntlora_core.data.photos import load_photos, photos_from_images
from cntlora_core.diffusion.compare import Comparison, compare
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.diffusion.prior import class_images
from cntlora_core.diffusion.run_identity import finished_run, run_identity, run_key
from cntlora_core.diffusion.sampler import LoRAUse, sample
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SamplingSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.diffusion.stages import encode_subject, plan_initialization, read_subject
from cntlora_core.lora_file.reading import load_lora_tensors, read_lora_file, read_lora_tensors


@pytest.fixture
def settings(tiny_model: Path, photo_folder: Path, tmp_path: Path) -> JobSettings:
    return JobSettings(
        model=str(tiny_model),
        subject=SubjectSettings(images=str(photo_folder), token="sks", class_name="dog"),
        output=OutputSettings(output=str(tmp_path / "one go")),
        prior=PriorSettings(num_class_images=2, class_steps=1, cache=str(tmp_path / "cache")),
        adapter=AdapterSettings(rank=4, alpha=8, init_passes=1),
        training=TrainingSettings(steps=2, lr_schedule="constant", device="cpu", seed=3),
    )


def test_stage_by_stage_is_the_same_as_in_one_go(settings, tmp_path) -> None:
    whole = personalise(settings)

    parts = load_stable_diffusion(settings.model)
    before = {n: p.clone() for n, p in parts.unet.named_parameters()}
    subject = read_subject(settings.subject, load_photos(settings.subject.images))
    photos = class_images(parts, subject.prompts.class_prompt, settings.prior, resolution=32)
    encoded = encode_subject(parts, subject, cache=tmp_path / "cache")
    with torch.inference_mode():  # as a host may have it
        initialization = plan_initialization(parts, encoded, settings.adapter, seed=3)
    assert all(torch.equal(before[n], p) for n, p in parts.unet.named_parameters())
    output = dataclasses.replace(settings.output, output=str(tmp_path / "staged"))
    staged = personalise(
        dataclasses.replace(settings, output=output),
        subject=subject,
        class_photos=photos,
        initialization=initialization,
    )
    a, b = read_lora_file(whole.lora).layers, read_lora_file(staged.lora).layers
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].up, b[n].up) and torch.equal(a[n].down, b[n].down) for n in a)
    assert staged.history[-1]["prior_loss"] > 0

    key = run_key(settings, run_identity(parts.fingerprint, subject, photos, 3))
    assert key == run_key(
        dataclasses.replace(settings, output=output, model="elsewhere"),
        run_identity(parts.fingerprint, subject, photos, 3),
    )
    found = finished_run(tmp_path / "staged")
    assert found is not None
    assert found.lora == staged.lora
    assert found.history == staged.history
    staged.lora.unlink()
    assert finished_run(tmp_path / "staged") is None
    assert finished_run(tmp_path / "cache") is None

    with pytest.raises(ValueError, match="other adapter settings"):
        personalise(
            dataclasses.replace(settings, adapter=AdapterSettings(rank=2)),
            initialization=initialization,
        )
    with pytest.raises(ValueError, match="made on another model"):
        dataclasses.replace(initialization, model="0" * 16).require_model(parts)


def change(settings: JobSettings, part: str, **values: Any) -> JobSettings:
    return dataclasses.replace(
        settings, **{part: dataclasses.replace(getattr(settings, part), **values)}
    )


def test_a_run_is_told_apart_by_what_shapes_its_training(settings, monkeypatch) -> None:
    subject = read_subject(settings.subject)

    def key(settings: JobSettings, **identity: Any) -> str:
        given = {"model": "m", "subject": subject, "class_photos": None, "init_seed": 0}
        return run_key(settings, run_identity(**{**given, **identity}))

    repainted = [np.asarray(photo.image) for photo in subject.photos.photos]
    repainted[0] = np.full_like(repainted[0], 7)
    other = read_subject(settings.subject, photos_from_images(repainted))
    different = [
        key(settings),
        key(settings, model="n"),
        key(settings, subject=other),
        key(settings, init_seed=1),
        key(settings, class_photos=subject.photos),
        key(change(settings, "training", lr_schedule="cosine")),
        key(change(settings, "training", lr_schedule="cosine", steps=3)),
        key(change(settings, "training", seed=4)),
        key(change(settings, "adapter", rank=5)),
    ]
    monkeypatch.setattr("cntlora_core.diffusion.run_identity.ALGORITHM", 10**6)
    different.append(key(settings))
    monkeypatch.undo()
    assert len(set(different)) == len(different)
    same = [
        change(settings, "training", sample_prompts=("a dog",), sample_every=1, device=None),
        change(settings, "output", output="elsewhere", name="rex", compress=False),
        change(settings, "output", layout="peft", file_precision="float32", keep_state=False),
        change(settings, "training", steps=3, gradient_checkpointing=True),
        change(settings, "subject", images="moved"),
    ]
    assert {key(same_run) for same_run in same} == {key(settings)}


@pytest.mark.thorough
def test_a_lora_in_memory_generates_what_its_file_generates(settings) -> None:
    lora = personalise(change(settings, "prior", prior_weight=0.0)).lora
    with torch.inference_mode():
        tensors, header = load_lora_tensors(lora)
    assert read_lora_tensors(tensors, header).layers.keys() == read_lora_file(lora).layers.keys()
    with pytest.raises(ValueError, match=r"this one is no LoRA"):
        read_lora_tensors({"x": torch.zeros(1)}, name="this one")
    few = SamplingSettings(steps=1)
    of_file = sample(settings.model, ["a dog"], [LoRAUse(lora)], few)[0]
    in_memory = sample(settings.model, ["a dog"], [LoRAUse(Path("it"), 1.0, tensors)], few)[0]
    assert of_file.tobytes() == in_memory.tobytes()

    pipeline = load_stable_diffusion(settings.model).pipeline()
    comparison = Comparison(("a dog", "a cat"), (0.0, 1.0), (0, 1, 2), sampling=few)
    told: list[tuple[int, int]] = []
    grid = compare(
        pipeline,
        [("first", LoRAUse(lora)), ("second", LoRAUse(lora))],
        comparison,
        lambda _stage, done, total, _values: told.append((done, total)),
    )
    assert told[-1] == (30, 30)  # 2 LoRAs x 2 strengths and the base, each 2 prompts x 3 seeds
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert not getattr(pipeline.unet, "peft_config", None)
    smaller = compare(pipeline, [("first", LoRAUse(lora))], comparison)
    assert grid.height - smaller.height > 90


def test_a_comparison_of_nothing_is_refused() -> None:
    for empty in ({"prompts": ()}, {"strengths": ()}, {"seeds": ()}):
        with pytest.raises(ValueError, match="nothing to compare"):
            Comparison(**{"prompts": ("a dog",), **empty})
