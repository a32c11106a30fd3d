"""Previews while training: their prompts, and memory that does not suffice for them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from cntlora_core.data.photos import pixel_digest
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.diffusion.prior import images_at_once
from cntlora_core.diffusion.trainer import SubjectTrainer

from ..conftest import StopAt, change, losses

PROMPTS = ("a photo of {token} {class} in the snow", "a {} in the box", "a cat")
FILLED = ("a_photo_of_sks_dog_in_the_snow", "a_sks_dog_in_the_box", "a_cat")


@pytest.fixture
def shown(plain):
    """A run with previews of three prompts after the second step and at the end."""
    return change(plain, "training", sample_prompts=PROMPTS, sample_every=2, sample_steps=1)


def samples(result) -> list[str]:
    return sorted(path.name for path in (result.folder / "samples").glob("*"))


def test_placeholders_are_filled_in(shown, tmp_path):
    result = personalise(shown)
    names = [f"{step:06d}-{name}.png" for step in (2, 3) for name in FILLED]
    assert samples(result) == sorted(names)
    words = change(shown, "output", output=str(tmp_path / "words"))
    words = change(words, "training", sample_prompts=tuple(n.replace("_", " ") for n in FILLED))
    same = personalise(words)
    for name in samples(same):
        one, other = (run.folder / "samples" / name for run in (result, same))
        assert pixel_digest(Image.open(one)) == pixel_digest(Image.open(other))


def test_placeholders_without_a_value_are_refused_before_any_work(shown):
    whole = {"instance_prompt": "a photo of my dog", "class_prompt": "a photo of a dog"}
    stages = StopAt(-1)
    settings = change(shown, "subject", token=None, class_name=None, **whole)
    with pytest.raises(ValueError, match=r"has \{token\}: give a token and a class name"):
        personalise(settings, reporter=stages)
    assert "loading the model" not in stages.stages


def scarce_memory(monkeypatch, most: int) -> list[int]:
    """In generating, the UNet has memory for so many rows; returns how many it was asked for."""
    init, asked = SubjectTrainer.__init__, []

    def hooked(trainer, *rest, **options):
        init(trainer, *rest, **options)

        def fail(unet, arguments, values):
            rows = len(values.get("sample", arguments[0] if arguments else ()))
            if not unet.training:
                asked.append(rows)
                if rows > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        trainer.unet.register_forward_pre_hook(fail, with_kwargs=True)

    monkeypatch.setattr(SubjectTrainer, "__init__", hooked)
    return asked


@pytest.mark.thorough
def test_where_memory_runs_out_previews_are_generated_one_by_one(shown, monkeypatch, tmp_path):
    whole = personalise(shown)
    asked = scarce_memory(monkeypatch, 2)  # one image, with and without its prompt
    result = personalise(change(shown, "output", output=str(tmp_path / "scarce")))
    assert asked == [6, *[2] * 6]
    assert losses(result) == losses(whole)
    assert samples(result) == samples(whole)
    assert [n for n in result.notes if "memory" in n] == [
        "memory ran out: previews are generated one by one"
    ]


def test_previews_that_find_no_memory_are_left_out_and_the_training_goes_on(
    shown, monkeypatch, tmp_path
):
    whole = personalise(change(shown, "training", sample_prompts=(), sample_every=0))
    scarce_memory(monkeypatch, 0)
    result = personalise(change(shown, "output", output=str(tmp_path / "scarce")))
    assert losses(result) == losses(whole)
    assert result.lora.is_file()
    assert samples(result) == []
    notes = json.loads((result.folder / "run.json").read_text("utf-8"))["notes"]
    for step in (2, 3):
        assert f"memory ran out: the previews after step {step} were left out" in notes


def test_an_error_of_another_kind_in_a_preview_is_raised(shown, monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("a defect")

    monkeypatch.setattr("cntlora_core.diffusion.previews.generate", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        personalise(shown)


def test_as_many_at_once_as_class_images(tiny_model, plain, monkeypatch):
    parts = load_stable_diffusion(tiny_model)
    assert [images_at_once(parts, side) for side in (64, 512, 768)] == [8, 1, 1]
    asked = scarce_memory(monkeypatch, 10**6)
    prompts = tuple(f"a dog {i}" for i in range(9))
    personalise(change(plain, "training", sample_prompts=prompts, sample_steps=1))
    assert asked == [16, 2]
