"""From anything Pillow opens to an RGB image, and from there to a tensor."""

from __future__ import annotations

import io
import math
import struct
import time
import zlib

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from cntlora_core.data import pictures
from cntlora_core.data.pictures import (
    picture_from_array,
    pixel_digest,
    read_picture,
    shrunk,
    to_model_tensor,
    upright_rgb,
)


def corners(width=12, height=8):
    """A picture whose orientation shows: red top left, green top right, blue bottom left."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 2, height // 2))
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    return image


def textured(width, height, seed=0, low=0, high=256):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(low, high, (9, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def pixels(image):
    return np.asarray(image, dtype=np.int64)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"), ("RGB", "bmp"), ("RGB", "tiff"), ("RGB", "webp"), ("RGB", "jpg"),
        ("RGBA", "png"), ("RGBA", "webp"), ("RGBA", "tiff"), ("L", "png"), ("L", "jpg"),
        ("L", "bmp"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("P", "bmp"), ("CMYK", "jpg"),
        ("CMYK", "tiff"), ("YCbCr", "tiff"), ("LAB", "tiff"),
    ],
)  # fmt: skip
def test_every_mode_keeps_its_colours(tmp_path, mode, suffix):
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 finds its own YCbCr TIFFs truncated")
    grey = mode in ("L", "LA")
    source = textured(120, 90)
    source = source.convert("L").convert("RGB") if grey else source
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        given_image = ImageCms.applyTransform(source, to_lab)
        assert given_image is not None
    else:
        given_image = source.convert(mode)
    if mode == "P":
        source = given_image.convert("RGB")
    path = tmp_path / f"a.{suffix}"
    given_image.save(path, quality=95)
    picture = read_picture(path)
    image, notes = picture.rgb, picture.notes
    assert image.mode == "RGB"
    assert image.size == (120, 90)
    assert notes == ()
    error = np.abs(pixels(image) - pixels(source))
    exact = suffix not in ("jpg", "webp") and mode not in ("LAB", "YCbCr")
    assert error.mean() <= (0 if exact else 8)
    assert np.corrcoef(pixels(image).ravel(), pixels(source).ravel())[0, 1] > 0.98


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.uint16([[0, 257, 25700, 65535]]), [0, 1, 100, 255]),
        (np.int32([[0, 257, 25700, 65535]]), [0, 1, 100, 255]),
        (np.int32([[0, 50_000, 100_000, -5]]), [0, 128, 255, 0]),
        (np.float32([[0.0, 0.5, 1.0, 0.2]]), [0, 128, 255, 51]),
        (np.float32([[0.0, 100.0, 255.0, 2.0]]), [0, 100, 255, 2]),
        (np.float32([[0.0, 500.0, 1000.0, math.nan]]), [0, 128, 255, 0]),
    ],
)
def test_deep_grey_values_are_scaled_not_clipped(tmp_path, values, expected):
    path = tmp_path / "a.tiff"
    Image.fromarray(values).save(path)
    image = read_picture(path).rgb
    assert pixels(image)[0, :, 1].tolist() == expected


def test_deep_grey_png(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = read_picture(tmp_path / "a.png").rgb
    assert np.array_equal(pixels(image)[..., 2].ravel(), np.arange(256))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_rotation_tag_is_applied(tmp_path, orientation, mode):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    upright = corners()
    if mode == "I;16":
        upright = Image.fromarray(pixels(upright.convert("L")).astype(np.uint16) * 257)
    else:
        upright = upright.convert(mode)
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    image = read_picture(tmp_path / "a.png").rgb
    assert np.array_equal(pixels(image), pixels(upright_rgb(upright).rgb))


def test_damaged_exif_does_not_lose_the_photo(tmp_path):
    textured(16, 16).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x01")
    picture = read_picture(tmp_path / "a.jpg")
    image, notes = picture.rgb, picture.notes
    assert image.size == (16, 16)
    assert any("EXIF" in note for note in notes)


def with_transparent_corner(mode):
    image = corners().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 6, 4))
    if mode == "half":
        image.paste((0, 0, 0, 128), (0, 0, 6, 4))
        return image
    if mode == "P":
        quantised = corners().quantize(4)
        quantised.info["transparency"] = quantised.getpixel((0, 0))
        return quantised
    if mode == "RGB key":
        keyed = corners()
        keyed.info["transparency"] = (255, 0, 0)
        return keyed
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB key", "PA", "La", "RGBa"])
def test_transparency_becomes_white(tmp_path, mode):
    image = with_transparent_corner("RGBA" if mode in ("PA", "La") else mode)
    if mode in ("La", "PA", "RGBa"):  # no file holds these: straight from memory
        if mode == "La":
            image = image.convert("LA").convert("La")
        if mode == "PA":
            alpha = image.getchannel("A")
            image = corners().quantize(4).convert("PA")
            image.putalpha(alpha)
        assert image.mode == mode
        rgb = upright_rgb(image).rgb
    else:
        image.save(tmp_path / "a.png", transparency=image.info.get("transparency"))
        rgb = read_picture(tmp_path / "a.png").rgb
    assert pixels(rgb)[:4, :6].min() == 255
    assert pixels(rgb)[:4, 6:].min() < 255  # the opaque rest is not white


def test_half_transparent_is_blended():
    rgb = upright_rgb(with_transparent_corner("half")).rgb
    assert pixels(rgb)[0, 0].tolist() == [127, 127, 127]


def test_wholly_transparent_is_said():
    picture = upright_rgb(Image.new("RGBA", (4, 4), (1, 2, 3, 0)))
    rgb, notes = picture.rgb, picture.notes
    assert pixels(rgb).min() == 255
    assert any("transparent throughout" in note for note in notes)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [corners(), Image.new("RGB", (12, 8), "black"), corners().rotate(180)]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    picture = read_picture(path)
    image, notes = picture.rgb, picture.notes
    assert notes == ("has 3 frames, the first one is used",)
    assert np.abs(pixels(image) - pixels(corners())).max() <= 2


def test_phone_photo_with_a_second_picture_is_no_animation(tmp_path):
    textured(16, 16).save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[textured(16, 16, 1)]
    )
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert read_picture(tmp_path / "a.jpg").notes == ()


def swapped_profile() -> bytes:
    """An sRGB profile with the primaries of red and green exchanged, under another name."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = content.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return content.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_colour_profile_is_applied_and_dropped(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path, icc_profile=swapped_profile())
    image = read_picture(path).rgb
    assert np.abs(pixels(image)[0, 0] - [0, 255, 0]).max() <= 3
    image.save(path)
    assert "icc_profile" not in Image.open(path).info
    again = upright_rgb(image).rgb
    assert pixel_digest(again) == pixel_digest(image)


@pytest.mark.parametrize("profile", [b"garbage", b"", "srgb"])
def test_srgb_and_damaged_profiles_change_nothing(tmp_path, profile):
    if profile == "srgb":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = textured(16, 16)
    source.save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(pixels(read_picture(tmp_path / "a.png").rgb), pixels(source))


def test_flat_colour_is_said():
    assert upright_rgb(Image.new("L", (5, 5), 0)).notes == ("is a single flat colour",)


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("side", [13_000, 60_000])  # above our limit, above Pillow's own
def test_bombs_are_refused_before_they_are_decoded(tmp_path, side):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(side, side) + struct.pack(">I", 50) + b"IDAT" + b"\x00" * 50)
    with pytest.raises(Image.DecompressionBombError):
        read_picture(path)


def test_limit_counts_also_for_images_in_memory(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    upright_rgb(Image.new("RGB", (10, 10)))
    with pytest.raises(Image.DecompressionBombError, match="11 x 10"):
        upright_rgb(Image.new("RGB", (11, 10)))


def test_no_format_that_starts_other_programs(tmp_path):
    buffer = io.BytesIO()
    textured(8, 8).save(buffer, "EPS")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(Image.UnidentifiedImageError):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "float16"])
def test_arrays(shape, dtype):
    values = np.random.default_rng(0).integers(0, 256, shape)
    array = values.astype(np.uint8) if dtype == "uint8" else (values / 255).astype(dtype)
    image = picture_from_array(array, "image 1")
    assert image.size == (5, 6)
    assert np.array_equal(pixels(image).reshape(shape), values)


def test_arrays_that_are_no_picture():
    for array, kind, words in (
        (np.zeros((2, 4, 4, 3), np.float32), ValueError, "one by one"),
        (np.zeros((3, 8, 8), np.float32), ValueError, r"\(3, 8, 8\)"),
        (np.zeros((0, 4, 3), np.float32), ValueError, "no pixels"),
        (np.full((4, 4, 3), 255.0), ValueError, r"0\.\.1, got 255"),
        (np.full((4, 4, 3), np.nan), ValueError, "nan"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "int64"),
    ):
        with pytest.raises(kind, match=words):
            picture_from_array(array, "image 1")
    overshoot = picture_from_array(np.float32([[[-0.1, 0.5, 1.2]]]), "x")
    assert pixels(overshoot).ravel().tolist() == [0, 128, 255]


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.integers(1, 48),
    st.sampled_from(["center", "random"]),
    st.booleans(),
    st.integers(0, 3),
)
def test_tensor_is_the_square_of_the_whole_resized(size, resolution, crop, flip, seed):
    """Against the naive way: resize the whole picture, then cut."""
    # Away from black and white: where Lanczos overshoots, Pillow clips between its two passes, in
    # an order that depends on the sizes.
    image = textured(*size, low=80, high=176)
    tensor = to_model_tensor(
        image, resolution, crop=crop, generator=torch.Generator().manual_seed(seed), flip=flip
    )
    assert tensor.shape == (3, resolution, resolution)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    whole = [max(resolution, round(side * resolution / min(size))) for side in size]
    spare = [side - resolution for side in whole]
    left, top = (side // 2 for side in spare)
    if crop == "random":
        generator = torch.Generator().manual_seed(seed)
        left, top = (int(torch.randint(0, n + 1, (), generator=generator)) for n in spare)
    naive = image.resize((whole[0], whole[1]), Image.Resampling.LANCZOS)
    naive = pixels(naive.crop((left, top, left + resolution, top + resolution)))
    naive = naive[:, ::-1] if flip else naive
    grey_levels = (tensor.permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(grey_levels - naive).max() <= 2.01


def test_white_black_and_order_of_channels():
    tensor = to_model_tensor(corners(16, 16), 16)
    assert tensor[:, 0, 0].tolist() == [1, -1, -1]
    assert tensor[:, 0, -1].tolist() == [-1, 1, -1]
    assert tensor[:, -1, 0].tolist() == [-1, -1, 1]
    assert tensor[:, -1, -1].tolist() == [1, 1, 1]
    assert torch.equal(to_model_tensor(corners(16, 16), 16, flip=True), tensor.flip(-1))


def test_downscaling_does_not_alias():
    checks = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8))
    tensor = to_model_tensor(checks.convert("RGB"), 64)
    assert tensor.abs().max() < 0.1  # mean grey; nearest neighbours would give black and white


@pytest.mark.parametrize("size", [(30_000, 3), (2, 40_000), (1, 1)])
def test_extreme_shapes_are_quick_and_small(size):
    start = time.perf_counter()
    tensor = to_model_tensor(Image.new("RGB", size, (255, 0, 0)), 256)
    assert time.perf_counter() - start < 2
    assert torch.equal(tensor, torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 256, 256))


@pytest.mark.parametrize("size", [(200, 130), (97, 301), (64, 64)])
def test_shrinking_first_changes_nothing(size):
    image = textured(*size)
    small = shrunk(image, 32)
    assert min(small.size) == 32
    difference = to_model_tensor(small, 32) - to_model_tensor(image, 32)
    assert difference.abs().max() <= 1.01 / 127.5
    assert shrunk(image, 500) is image


def test_tensor_errors():
    image = corners()
    with pytest.raises(ValueError, match="generator"):
        to_model_tensor(image, 8, crop="random")
    with pytest.raises(ValueError, match="'centre'"):
        to_model_tensor(image, 8, crop="centre")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        to_model_tensor(image, 0)
    grey = corners().convert("L")
    assert torch.equal(to_model_tensor(grey, 8), to_model_tensor(grey.convert("RGB"), 8))


def test_digest_sees_pixels_and_size_only():
    image = textured(12, 6)
    assert pixel_digest(image) == pixel_digest(image.copy())
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    reshaped = Image.frombytes("RGB", (6, 12), image.tobytes())
    assert len({pixel_digest(i) for i in (image, changed, reshaped)}) == 3
