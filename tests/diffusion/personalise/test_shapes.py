"""Photos as they come: tall, wide, square, cut out; what is said of them, and resuming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cntlora_core.data.framing import frame
from cntlora_core.data.photos import photos_from_images
from cntlora_core.diffusion import job
from cntlora_core.diffusion.stages import read_subject
from cntlora_core.figures.sheets import photo_sheet

from ..conftest import StopAt, change, losses


def left_half(size):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.fixture
def mixed(settings, photo_folder):
    """One photo tall, one wide with a mask, one square, one cut out."""
    shapes = {0: (45, 80), 1: (60, 40), 3: (48, 48)}
    for i, size in shapes.items():
        path = photo_folder / f"{i}.png"
        with Image.open(path) as image:
            image.resize(size).save(path)
    left_half((60, 40)).save(photo_folder / "1.mask.png")
    with Image.open(photo_folder / "3.png") as image:
        image.putalpha(left_half((48, 48)))
        image.save(photo_folder / "3.png")
    settings = change(settings, "adapter", init_passes=1)
    settings = change(settings, "prior", class_steps=1)
    return change(settings, "training", steps=3, batch_size=2)


@pytest.mark.thorough
def test_tall_and_wide_photos_train_with_class_images_and_resume_to_the_same(mixed, tmp_path):
    whole = job.personalise(mixed)
    again = change(mixed, "output", output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        job.personalise(again, reporter=StopAt(1))
    resumed = job.personalise(again, resume=True)
    assert losses(resumed) == losses(whole)
    assert all(record["prior_loss"] > 0 for record in whole.history)
    first, second = load_file(whole.lora), load_file(resumed.lora)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "cropped: 4 % of the width of 0.png, 5 % of the width of 1.png" in whole.notes
    assert "outside the masks of 1.png, 3.png the loss weighs 0.1 of that inside" in whole.notes
    with Image.open(whole.folder / job.PHOTOS_NAME) as sheet:
        assert sheet.size == (2 * 264 + 8, 2 * 282 + 8)

    square = change(mixed, "subject", crop=True)
    with pytest.raises(ValueError, match=r"these differ: job\.subject\.crop\."):
        job.personalise(square, resume=True)
    cropped = job.personalise(change(square, "training", steps=1), overwrite=True)
    assert "cropped: 44 % of the height of 0.png, 33 % of the width of 1.png" in cropped.notes


def test_a_name_of_the_sheet_is_refused(settings):
    named = change(settings, "output", layout="peft", name="photos.jpg")
    with pytest.raises(ValueError, match="keeps a file of its own"):
        job.personalise(named)


def test_masks_are_part_of_what_a_subject_is(settings):
    photo = np.asarray(Image.linear_gradient("L").convert("RGB"))
    mask = left_half((256, 256))

    def identity(mask):
        photos = photos_from_images([photo], masks=[mask])
        return read_subject(settings.subject, photos).identity()

    masked = identity(mask)
    assert masked["photos"] == identity(None)["photos"]
    assert masked != identity(None)
    assert masked != identity(mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="unmasked_weight must be at least 0 and at most 1"):
            change(settings, "subject", unmasked_weight=value)


def test_the_sheet_shows_what_is_cropped_and_what_is_masked():
    grey = np.full((100, 200, 3), 90, np.uint8)
    photos = photos_from_images([grey, grey[:, :100]], masks=[left_half((200, 100)), None])
    frames = [frame((200, 100), (64, 64)), frame((100, 100), (64, 64))]
    sheet = np.asarray(photo_sheet(photos.photos, ["a", "b"], frames, side=200), np.int64)
    wide = sheet[8:108, 8:208]
    assert abs(wide[50, 80] - 90).max() <= 1  # within the mask and the crop
    assert abs(wide[50, 10] - 90).min() > 60  # cropped: nearly white
    assert wide[50, 120, 0] > wide[50, 120, 1] + 30  # outside the mask: tinted
    plain = photo_sheet(photos.photos, ["a", "b"], frames, masked=False, side=200)
    assert plain.getpixel((8 + 120, 8 + 50)) == (90, 90, 90)
    outline = wide[50, 50]
    assert outline[2] > outline[0] + 60
    assert abs(sheet[100, 316] - 90).max() <= 1  # the square photo is whole
