"""Generated class images: each a function of its own seed; nothing damaged is kept or taken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
from cntlora_core.diffusion.prior import class_images
from cntlora_core.diffusion.settings import PriorSettings

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> StableDiffusionParts:
    return load_stable_diffusion(tiny_model)


def generate(parts: StableDiffusionParts, cache: Path, number: int = 10, seed: int = 0, **more):
    settings = PriorSettings(
        num_class_images=number, class_steps=1, cache=str(cache), class_seed=seed
    )
    found = class_images(parts, PROMPT, settings, resolution=32, **more)
    return [photo.digest for photo in found.photos]


@pytest.mark.thorough
def test_an_interrupted_generation_goes_on_to_the_same_images(parts, tmp_path) -> None:
    whole = generate(parts, tmp_path / "whole")
    assert len(set(whole)) == 10

    def stop(_stage, done, _total, _values):
        if done >= 8:
            raise KeyboardInterrupt

    cache = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        generate(parts, cache, reporter=stop)
    for name in ("00002.png", "00007.png"):  # killed before these were written
        next(cache.glob(f"class_images/*/{name}")).unlink()
    assert generate(parts, cache) == whole
    assert generate(parts, tmp_path / "few", 3) == whole[:3]
    assert generate(parts, tmp_path / "few") == whole


def test_another_class_seed_generates_another_set(parts, tmp_path) -> None:
    first = generate(parts, tmp_path, 2)
    for seed in (1, 2**63 + 1):
        assert not set(first) & set(generate(parts, tmp_path, 2, seed=seed))


def test_damaged_images_in_the_cache_are_generated_again(parts, tmp_path) -> None:
    sound = generate(parts, tmp_path, 4)
    paths = sorted(tmp_path.glob("class_images/*/*.png"))
    Image.new("RGB", (32, 32)).save(paths[0])
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    paths[2].write_bytes(b"")
    assert generate(parts, tmp_path, 4) == sound


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_images_of_a_model_that_is_not_finite_are_refused_and_not_kept(tiny_model, tmp_path):
    spoilt = load_stable_diffusion(tiny_model)
    with torch.no_grad():
        spoilt.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="single colour"):
        generate(spoilt, tmp_path, 2)
    assert list(tmp_path.rglob("*.png")) == []
    sound = dataclasses.replace(load_stable_diffusion(tiny_model), fingerprint=spoilt.fingerprint)
    assert len(set(generate(sound, tmp_path, 2))) == 2
