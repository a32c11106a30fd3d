"""Encoding once, and a cache that notices what changed."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from cntlora_core.data import latents
from cntlora_core.data.latents import cache_key, encode_latents
from cntlora_core.data.photos import photos_from_images, to_model_tensor


def make_vae(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
        ).eval()


def picture(seed, size=(40, 24)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


PHOTOS = photos_from_images([picture(i) for i in range(3)])


class Counting:
    """Counts how often the VAE, or a copy of it, encodes."""

    def __init__(self, vae, monkeypatch):
        self.pictures: list[torch.Tensor] = []
        original = type(vae).encode

        def encode(vae, x, *args, **kwargs):
            self.pictures.append(x)
            return original(vae, x, *args, **kwargs)

        monkeypatch.setattr(type(vae), "encode", encode)

    def take(self) -> int:
        count = len(self.pictures)
        self.pictures.clear()
        return count


@pytest.fixture(autouse=True)
def one_thread():
    """The VAE is so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def vae():
    return make_vae()


@pytest.fixture
def count(vae, monkeypatch):
    return Counting(vae, monkeypatch)


def same(a, b):
    pairs = zip((*a.mean, *a.std), (*b.mean, *b.std), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_posterior_of_every_photo_and_flip(vae):
    result = encode_latents(PHOTOS, vae, resolution=16, flip=True)
    assert len(result) == 6
    assert {tuple(t.shape) for t in (*result.mean, *result.std)} == {(4, 8, 8)}
    assert {t.dtype for t in (*result.mean, *result.std)} == {torch.float32}
    assert result.weights == (None,) * 6
    assert result.photo_index == (0, 1, 2, 0, 1, 2)
    assert result.flipped == (False,) * 3 + (True,) * 3
    assert result.digests == tuple(p.digest for p in PHOTOS.photos) * 2
    assert result.from_cache == 0
    for entry in range(6):
        image = PHOTOS.photos[entry % 3].image
        pixels = to_model_tensor(image, 16, flip=entry >= 3)
        with torch.no_grad():
            expected = vae.encode(pixels[None]).latent_dist
        torch.testing.assert_close(result.mean[entry], expected.mean[0])
        torch.testing.assert_close(result.std[entry], expected.std[0])
    assert same(encode_latents(PHOTOS.photos, vae, resolution=16, flip=True), result)


def test_samples_follow_the_posterior(vae):
    result = encode_latents(PHOTOS, vae, resolution=16)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([result.sample(1, generator) for _ in range(4000)])
    scale = vae.config["scaling_factor"]
    assert result.scaling_factor == scale == 0.18215
    deviation = (draws.mean(0) - scale * result.mean[1]) / (scale * result.std[1])
    assert deviation.abs().max() < 6 / 4000**0.5
    ratio = draws.std(0) / (scale * result.std[1])
    assert (ratio - 1).abs().max() < 0.08
    again = torch.Generator().manual_seed(0)
    assert torch.equal(result.sample(1, again), draws[0])


def test_cache_is_used_and_exact(vae, count, tmp_path):
    options = {"resolution": 16, "cache_dir": tmp_path / "c", "vae_fingerprint": "v"}
    first = encode_latents(PHOTOS, vae, **options)
    assert count.take() == 3
    second = encode_latents(PHOTOS, vae, **options)
    assert count.take() == 0
    assert second.from_cache == 3
    assert same(first, second)
    assert same(encode_latents(PHOTOS, vae, resolution=16), first)
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_cache_notices_every_change(vae, count, tmp_path):
    def run(photos=PHOTOS, **changes):
        options = {"resolution": 16, "cache_dir": tmp_path, "vae_fingerprint": "v", **changes}
        result = encode_latents(photos, vae, **options)
        made = count.take()
        plain = encode_latents(photos, vae, **{**options, "cache_dir": None})
        count.take()
        assert same(result, plain)
        return made

    assert run() == 3
    assert run(flip=True) == 3  # only the mirrored ones are new
    assert run(resolution=8) == 3
    assert run(crop="random") == 3
    assert run(vae_fingerprint="w") == 3
    edited = picture(1)
    edited[0, 0, 0] ^= 1
    assert run(photos_from_images([picture(0), edited, picture(2)])) == 1
    assert run(photos_from_images([picture(2), picture(0)])) == 0
    weights = copy.deepcopy(vae.state_dict())
    vae.to(torch.bfloat16)
    assert run() == 3
    vae.to(torch.float32).load_state_dict(weights)
    assert run() == 0


def test_key_depends_on_each_part(monkeypatch):
    base = ("d", "v", torch.float32, (512, 512), "center", False)
    variants = [
        base,
        ("e", *base[1:]),
        (base[0], "w", *base[2:]),
        (*base[:2], torch.float16, *base[3:]),
        (*base[:3], (256, 256), *base[4:]),
        (*base[:3], (384, 640), *base[4:]),
        (*base[:3], (640, 384), *base[4:]),
        (*base[:4], "random", False),
        (*base[:5], True),
        ("d', 'v", "", *base[2:]),
    ]
    keys = {cache_key(*v) for v in variants}  # type: ignore[arg-type]
    assert len(keys) == len(variants)
    monkeypatch.setattr(latents, "FORMAT_VERSION", latents.FORMAT_VERSION + 1)
    assert cache_key(*base) not in keys  # type: ignore[arg-type]


def test_damaged_entries_are_made_again(vae, count, tmp_path):
    options = {"resolution": 16, "cache_dir": tmp_path, "vae_fingerprint": "v"}
    good = encode_latents(PHOTOS, vae, **options)
    count.take()
    a, b, c = sorted(tmp_path.iterdir())
    a.write_bytes(a.read_bytes()[:-10])
    b.write_bytes(b"")
    c.write_bytes(a.with_name(b.name).read_bytes() + b"nonsense")
    assert same(encode_latents(PHOTOS, vae, **options), good)
    assert count.take() == 3
    a.write_bytes(b.read_bytes())  # a valid entry under another's name
    assert same(encode_latents(PHOTOS, vae, **options), good)
    assert count.take() == 1
    assert same(encode_latents(PHOTOS, vae, **options), good)
    assert count.take() == 0


def test_no_flipped_bit_goes_unnoticed(vae, tmp_path):
    options = {"resolution": 16, "cache_dir": tmp_path, "vae_fingerprint": "v"}
    good = encode_latents(PHOTOS.photos[:1], vae, **options)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    rng = random.Random(0)
    noticed = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        entry = latents._read_entry(path, path.stem)
        noticed += entry is None
        if entry is not None:  # in the padding of the header, say
            assert torch.equal(entry[0], good.mean[0])
            assert torch.equal(entry[1], good.std[0])
    assert noticed > 280


def test_random_crop_is_fixed_for_each_photo(vae):
    wide = [picture(i, (160, 16)) for i in range(6)]
    options = {"resolution": 16, "crop": "random", "flip": True}
    first = encode_latents(photos_from_images(wide), vae, **options)
    back = encode_latents(photos_from_images(wide[::-1]), vae, **options)
    order = [5, 4, 3, 2, 1, 0]
    assert all(torch.equal(first.mean[i], back.mean[j]) for i, j in enumerate(order))
    centre = encode_latents(photos_from_images(wide), vae, resolution=16, flip=True)
    assert not any(torch.equal(a, b) for a, b in zip(first.mean, centre.mean))
    same_content = np.tile(picture(0, (1, 16)), (1, 160, 1))  # any crop of it is the same
    other = encode_latents(photos_from_images([same_content]), vae, **options)
    torch.testing.assert_close(other.mean[0], other.mean[1])


def test_random_crops_of_different_photos_differ():
    ramp = np.linspace(0, 250, 160).astype(np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2)
    photos = photos_from_images([ramp + np.uint8(i) for i in range(6)]).photos
    brightness = [
        latents._pixels(photo, (16, 16), "random", False).mean().item() for photo in photos
    ]
    assert max(brightness) - min(brightness) > 0.3  # at one place they would be within 0.05


def test_a_photo_given_twice_is_encoded_once(vae, count):
    photos = photos_from_images([picture(0), picture(1), picture(0)])
    result = encode_latents(photos, vae, resolution=16)
    assert count.take() == 2
    assert torch.equal(result.mean[0], result.mean[2])
    assert len(result) == 3


def test_progress_and_cancel(vae, count, tmp_path):
    options = {"resolution": 16, "cache_dir": tmp_path, "vae_fingerprint": "v", "flip": True}
    calls = []

    class Cancelled(Exception):
        pass

    def cancel(done, total):
        calls.append((done, total))
        if done == 2:
            raise Cancelled

    vae.train()
    with pytest.raises(Cancelled):
        encode_latents(PHOTOS, vae, progress=cancel, **options)
    assert calls == [(0, 6), (1, 6), (2, 6)]
    assert vae.training
    assert count.take() == 2
    calls.clear()
    encode_latents(PHOTOS, vae, progress=lambda *call: calls.append(call), **options)
    assert calls == [(i, 6) for i in range(7)]
    assert count.take() == 4


def test_vae_is_left_as_it_was(vae):
    before = copy.deepcopy(vae.state_dict())
    encode_latents(PHOTOS, vae, resolution=16)
    assert not vae.training
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert all(parameter.requires_grad for parameter in vae.parameters())


def test_training_is_possible_from_inside_inference_mode(vae, tmp_path):
    for _ in range(2):  # the second time from the cache
        with torch.inference_mode():
            result = encode_latents(
                PHOTOS, vae, resolution=16, cache_dir=tmp_path, vae_fingerprint="v"
            )
        assert not any(t.is_inference() for t in (*result.mean, *result.std))
        weight = torch.ones(4, requires_grad=True)
        sample = result.sample(0, torch.Generator())
        (weight[:, None, None] * sample).sum().backward()
        assert weight.grad is not None


def overflowing(dtype):
    """Black and white overflow float16 in the first convolution, grey does not."""
    vae = make_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(2e4)
    return vae.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_in_half_precision_encodes_in_float32(dtype):
    vae = overflowing(dtype)
    grey = np.full((16, 16, 3), 127, np.uint8)
    photos = photos_from_images([grey, np.full((16, 16, 3), 255, np.uint8)])
    result = encode_latents(photos, vae, resolution=16)
    assert vae.dtype == dtype
    assert same(result, encode_latents(photos, overflowing(dtype).float(), resolution=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_broken_vae_is_an_error(dtype, tmp_path):
    vae = make_vae().to(dtype)
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] = torch.nan
    with pytest.raises(ValueError, match="image 1 are not finite"):
        encode_latents(PHOTOS, vae, resolution=16, cache_dir=tmp_path, vae_fingerprint="v")
    assert list(tmp_path.iterdir()) == []


def test_an_infinite_variance_is_not_hidden_by_its_clamp():
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias[4:] = torch.inf
    with pytest.raises(ValueError, match="image 1 are not finite"):
        encode_latents(PHOTOS, vae, resolution=16)


def test_wrong_arguments(vae, tmp_path):
    for options, words in (
        ({"resolution": 15}, "multiple of 2 .* got 15: 16 is the nearest"),
        ({"resolution": 0}, "multiple of 2"),
        ({"resolution": 16, "crop": "left"}, "'left'"),
        ({"resolution": 16, "cache_dir": tmp_path}, "needs vae_fingerprint"),
    ):
        with pytest.raises(ValueError, match=words):
            encode_latents(PHOTOS, vae, **options)
    with pytest.raises(ValueError, match="no photos"):
        encode_latents([], vae, resolution=16)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        encode_latents(PHOTOS, vae, resolution=16, cache_dir=tmp_path / "file", vae_fingerprint="v")


def test_full_disk_is_said_before_encoding(vae, count, tmp_path, monkeypatch):
    from cntlora_core.runtime import files

    monkeypatch.setattr(files, "_free_bytes", lambda _: 3000)
    with pytest.raises(OSError, match=r"Needed: 9\.2 kB; free: 3\.0 kB"):
        encode_latents(PHOTOS, vae, resolution=16, cache_dir=tmp_path, vae_fingerprint="v")
    assert count.take() == 0


def test_a_rectangle_is_cropped_square(vae):
    portrait = photos_from_images([Image.fromarray(picture(0, (20, 90)))])
    assert encode_latents(portrait, vae, resolution=18).mean[0].shape == (4, 9, 9)
