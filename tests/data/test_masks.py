"""Masks of photos: where they come from, and the weights that follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cntlora_core.data.framing import frame
from cntlora_core.data.latents import encode_latents
from cntlora_core.data.masks import loss_weights
from cntlora_core.data.photos import load_photos, photos_from_images

from .test_latents import make_vae


def picture(seed, size=(40, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def left_half(size=(40, 24)):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def share(photo):
    """Of white in a photo's mask, or None."""
    return None if photo.mask is None else float(np.asarray(photo.mask).mean()) / 255


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        picture(i).save(tmp_path / f"{i}.png")
    return tmp_path


def test_masks_are_found_by_the_names_of_other_trainers(folder):
    left_half().save(folder / "0.mask.png")
    left_half((80, 48)).convert("RGB").save(folder / "1-masklabel.png")
    (folder / "masks").mkdir()
    left_half().save(folder / "masks" / "2.png")
    cut_out = picture(3).convert("RGBA")
    cut_out.putalpha(left_half())
    cut_out.save(folder / "3.png")
    left_half().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "4.mask.png")
    found = load_photos(folder)
    assert [p.path.name for p in found.photos] == [f"{i}.png" for i in range(6)]
    assert [share(photo) for photo in found.photos] == pytest.approx([0.5] * 5 + [None])
    assert all(p.mask.size == p.image.size for p in found.photos[:5])
    assert found.photos[4].mask.getpixel((0, 0)) == 0
    assert found.photos[3].image.getpixel((39, 0)) == (255, 255, 255)
    assert found.warnings == ()
    assert found.photos[0].digest == photos_from_images([picture(0)]).photos[0].digest


def test_a_file_goes_before_transparency_and_its_own_transparency_is_black(folder):
    cut_out = picture(0).convert("RGBA")
    cut_out.putalpha(left_half())
    cut_out.save(folder / "0.png")
    top = Image.new("L", (40, 24))
    top.paste(255, (0, 0, 40, 12))
    top.save(folder / "0.mask.png")
    white = Image.new("RGBA", (40, 24), "white")
    white.putalpha(left_half())
    white.save(folder / "1.mask.png")
    found = load_photos(folder)
    assert found.photos[0].mask.getpixel((39, 0)) == 255
    assert found.photos[0].mask.getpixel((0, 23)) == 0
    assert share(found.photos[1]) == pytest.approx(0.5)


def test_masks_that_tell_nothing_are_said_and_the_photo_is_used(folder):
    Image.new("L", (40, 24)).save(folder / "0.mask.png")
    left_half((24, 24)).save(folder / "1.mask.png")
    (folder / "2.mask.png").write_bytes(b"")
    Image.new("L", (40, 24), 255).save(folder / "3.mask.png")
    left_half().save(folder / "nobody.mask.png")
    found = load_photos(folder)
    assert [share(photo) for photo in found.photos] == [None] * 6
    assert found.warnings == (
        "0.mask.png is black throughout, so the whole photo is learnt",
        "1.mask.png is of another shape than its photo, 24 x 24 to 40 x 24 pixels, so the whole "
        "photo is learnt",
        "2.mask.png: the file is empty (0 bytes), so the whole photo is learnt",
        "nobody.mask.png is not used: no picture has this name",
    )


def test_masks_in_memory():
    mask = np.asarray(left_half(), np.float32) / 255
    cut_out = picture(3).convert("RGBA")
    cut_out.putalpha(left_half())
    given = [picture(0), picture(1), picture(2), cut_out]
    found = photos_from_images(given, masks=[mask, left_half(), np.zeros((64, 64)), None])
    assert [share(p) for p in found.photos] == pytest.approx([0.5, 0.5, None, 0.5])
    assert found.warnings == (
        "the mask of image 3 is black throughout, so the whole photo is learnt",
    )
    with pytest.raises(ValueError, match=r"the mask of image 1 is of another shape .* 24 x 24 to"):
        photos_from_images([picture(0)], masks=[mask[:, :24]])
    with pytest.raises(ValueError, match="1 images but 2 masks"):
        photos_from_images([picture(0)], masks=[None, None])


def test_weights_are_the_mask_s_means_with_a_floor_and_of_mean_one():
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8))
    part = frame((40, 24), (24, 24))
    assert part.box == (8, 0, 32, 24)
    given = np.asarray(mask)[:, 8:32].reshape(8, 3, 8, 3).mean((1, 3)) / 255
    floored = np.clip(given, 0.45, 1)
    weights = loss_weights(mask, part, (8, 8), 0.45, flip=False)
    torch.testing.assert_close(
        weights, torch.from_numpy((floored / floored.mean()).astype(np.float32))
    )
    assert weights.mean() == pytest.approx(1)
    mirrored = loss_weights(mask, part, (8, 8), 0.45, flip=True)
    assert torch.equal(mirrored, weights.flip(-1))
    outside = loss_weights(left_half(), part, (8, 8), 0.1, flip=False)
    assert outside[0, 0] / outside[0, -1] == pytest.approx(10)
    inside_only = Image.new("L", (40, 24))
    inside_only.paste(255, (8, 0, 32, 24))
    assert loss_weights(inside_only, part, (8, 8), 0.1, flip=False) is None


def test_latents_carry_the_weights_of_their_bucket_and_side():
    photos = photos_from_images([picture(0), picture(1, (24, 24))], masks=[left_half(), None])
    latents = encode_latents(
        photos, make_vae(), resolution=32, bucket_step=4, flip=True, unmasked_weight=0.1
    )
    assert [tuple(mean.shape) for mean in latents.mean] == [(4, 12, 20), (4, 16, 16)] * 2
    assert latents.weights[1] is latents.weights[3] is None
    assert latents.weights[0].shape == (12, 20)
    assert latents.weights[0][0, 0] == pytest.approx(10 * latents.weights[0][0, -1])
    assert torch.equal(latents.weights[2], latents.weights[0].flip(-1))
    plain = encode_latents(photos, make_vae(), resolution=32, bucket_step=4)
    assert plain.weights == (None, None)
    assert torch.equal(plain.mean[0], latents.mean[0])
