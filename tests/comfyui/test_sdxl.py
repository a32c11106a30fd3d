"""SDXL, from photos to pictures, by the nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cntlora_core.lora_file.families import SDXL_FILES, family_of_keys

from ..diffusion.sdxl.conftest import tiny_sdxl  # noqa: F401
from .conftest import Pack, pictures, subject_of, train


@pytest.fixture(scope="module")
def model(pack: Pack, comfy: Path, tiny_sdxl: Path) -> Any:  # noqa: F811
    link = comfy / "models" / "diffusers" / "tiny sdxl"
    link.symlink_to(tiny_sdxl, target_is_directory=True)
    assert pack.nodes["CNTLoRALoadModel"].validate_inputs("diffusers/tiny sdxl") is True
    return pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny sdxl", clip_skip=2).args[0]


@pytest.mark.thorough
def test_a_lora_of_sdxl_is_trained_and_changes_the_pictures(pack: Pack, model: Any) -> None:
    subject = subject_of(pack, images=[pictures()]).args[0]
    few = {"rank": 2, "passes": 1}
    initialized = pack.run("CNTLoRAInitialize", model=model, subject=subject, **few).args[0]
    lora = train(pack, initialized, preview_every=0, steps=2).args[0]
    assert family_of_keys(lora) == SDXL_FILES
    few = {"model": model, "prompts": "a photo of sks dog", "steps": 1}
    generated = pack.run("CNTLoRASample", lora=lora, **few).args[0]
    assert not torch.equal(generated, pack.run("CNTLoRASample", **few).args[0])


def test_class_images_of_a_folder_are_held_at_the_model_s_size(
    pack: Pack, model: Any, comfy: Path
) -> None:
    folder = comfy / "input" / "dogs"
    folder.mkdir()
    Image.new("RGB", (100, 80), "red").save(folder / "1.png")
    subject = subject_of(pack, images=[pictures()]).args[0]
    chosen = {"model": model, "subject": subject, "source": "dogs"}
    found = pack.run("CNTLoRAClassImages", **chosen).args[0]
    assert [photo.image.size for photo in found.photos.photos] == [(40, 32)]


@pytest.mark.parametrize(("folder", "layer"), [("tiny", -2), ("tiny sdxl", -3)])
def test_ksampler_reads_the_layer_that_the_training_reads(
    pack: Pack, model: Any, monkeypatch: pytest.MonkeyPatch, folder: str, layer: int
) -> None:
    """ComfyUI calls SDXL's usual layer, the last but one, -2."""

    class Clip:
        def clone(self) -> Clip:
            return self

        def clip_layer(self, number: int) -> None:
            self.layer = number

    clip = Clip()
    monkeypatch.setattr(pack.module("load"), "_opened", lambda _model: (None, clip, None))
    chosen = pack.run("CNTLoRALoadModel", checkpoint=f"diffusers/{folder}", clip_skip=2).args[0]
    pack.run("CNTLoRAOpenModel", model=chosen)
    assert clip.layer == layer
