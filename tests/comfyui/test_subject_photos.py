"""The photos of the subject: shapes, masks, captions, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from .conftest import Pack, pictures, subject_of


def test_images_of_different_sizes_become_a_subject(run: SimpleNamespace) -> None:
    subject, shown, prompt, report = run.subject.args
    assert len(subject.photos.photos) == 3
    assert [tuple(picture.shape) for picture in shown] == [(1, 512, 512, 3)] * 3
    assert prompt == "a photo of sks dog"
    assert report.startswith("3 photos")


def test_photos_keep_their_shape_and_take_masks(pack: Pack, comfy: Path) -> None:
    with torch.inference_mode():
        wide, mask = torch.rand(2, 60, 80, 3), torch.zeros(2, 60, 80)
        mask[0, :, :40] = 1.0
    kept = subject_of(pack, images=[wide], masks=[mask])
    subject, shown, _, report = kept.args
    assert [tuple(picture.shape) for picture in shown] == [(1, 448, 576, 3)] * 2
    assert [photo.mask is None for photo in subject.photos.photos] == [False, True]
    assert "the mask of image 2 is black throughout" in report
    assert "cropped: 4 % of the width of image 1" in report
    (sheet,) = kept.ui["images"]
    with Image.open(comfy / sheet["type"] / sheet["filename"]) as picture:
        assert picture.size == (2 * 200 + 8, 218 + 8)

    assert "enlarged" not in report, "the model's resolution is not known here"
    assert "60 pixels and is enlarged" in subject_of(pack, images=[wide], resolution=512).args[3]

    cropped = subject_of(pack, images=[wide], crop=True, unmasked_weight=0.0)
    assert [tuple(picture.shape) for picture in cropped.args[1]] == [(1, 512, 512, 3)] * 2
    assert "25 % of the width of image 1" in cropped.args[3]
    assert cropped.args[0].settings.crop
    assert cropped.args[0].settings.unmasked_weight == 0


def test_a_changed_photo_changes_the_fingerprint(pack: Pack, comfy: Path) -> None:
    folder = comfy / "input" / "my dog"
    folder.mkdir()
    widgets = {"token": ["sks"], "class_name": ["dog"], "captions": [""], "flip": [False],
               "resolution": [0], "crop": [False], "unmasked_weight": [0.1]}  # fmt: skip
    fingerprint = pack.nodes["CNTLoRASubject"].fingerprint_inputs

    def now() -> str:
        return fingerprint(folder=["my dog"], **widgets)

    Image.new("RGB", (40, 40), "red").save(folder / "1.png")
    first = now()
    (folder / "notes.md").write_text("nothing to do with it")
    assert now() == first
    Image.new("RGB", (40, 40), "blue").save(folder / "1.png")
    second = now()
    (folder / "1.txt").write_text("a photo of {token} {class} at night")
    third = now()
    (folder / "masks").mkdir()
    Image.new("L", (40, 40), 255).save(folder / "masks" / "1.png")
    assert len({first, second, third, now()}) == 4
    assert fingerprint(folder=["(none)"], **widgets) == ""
    subject = subject_of(pack, folder="my dog").args[0]
    assert subject.training_prompts.prompts == ("a photo of sks dog at night",)
    assert "my dog" in pack.module("widgets").input_folders()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "there are no photos"),
        ({"images": [pictures()], "folder": "my dog"}, "set folder to"),
        ({"images": [pictures()], "captions": "one\ntwo"}, "3 images but 2 captions"),
        ({"images": [pictures()], "masks": [torch.ones(2, 40, 40)]}, "3 images but 2 masks"),
        ({"folder": "example/penguin", "captions": "one"}, "captions are for connected images"),
        ({"folder": "../models"}, "no folder"),
        ({"images": [pictures()], "token": "dog"}, "share the word"),
    ],
)
def test_bad_photos_are_an_error_in_words(pack: Pack, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        subject_of(pack, **inputs)
