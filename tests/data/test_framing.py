"""The part of a picture that is kept, and the bucket that keeps most of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.data.framing import (
    bucket_step,
    buckets,
    crop_note,
    enlarged_notes,
    frame,
    nearest_bucket,
)

SIDES = st.integers(1, 5000)


def test_buckets_have_the_square_s_area_and_sides_that_suit_the_model():
    assert buckets(512, 64)[0] == (512, 512)
    for resolution, step in ((512, 64), (64, 8), (768, 64), (520, 64), (256, 32)):
        for width, height in buckets(resolution, step)[1:]:
            assert width % step == height % step == 0
            assert 7 / 8 <= width * height / resolution**2 <= 9 / 8
            assert 1 / 2 <= width / height <= 2
            assert (height, width) in buckets(resolution, step)
    assert buckets(64, 8) == [(width // 8, height // 8) for width, height in buckets(512, 64)]


@pytest.mark.parametrize(
    ("picture", "size", "lost"),
    [
        ((3000, 4000), (448, 576), 0.036),
        ((3000, 2000), (640, 448), 0.048),
        ((1080, 1920), (384, 704), 0.031),
        ((2000, 1000), (768, 384), 0),
        ((700, 700), (512, 512), 0),
        ((1000, 1001), (512, 512), 0.002),
    ],
)
def test_usual_shapes_lose_little(picture, size, lost):
    assert nearest_bucket(picture, 512, 64) == size
    assert max(frame(picture, size).cropped) == pytest.approx(lost, abs=1e-3)


@settings(max_examples=200, deadline=None)
@given(st.tuples(SIDES, SIDES), st.sampled_from([(512, 64), (64, 8), (32, 4), (520, 64)]))
def test_no_other_bucket_keeps_more_and_none_is_larger_than_the_square_made_it(picture, model):
    resolution, step = model
    size = nearest_bucket(picture, resolution, step)
    part = frame(picture, size)
    least = min(picture)

    def kept(other):
        ratio = other[0] * picture[1] / (other[1] * picture[0])
        return min(ratio, 1 / ratio)

    for other in buckets(resolution, step):
        grows = max(other[0] / picture[0], other[1] / picture[1]) > resolution / least * (1 + 1e-9)
        assert grows or kept(other) <= kept(size) + 1e-9
    assert max(size[0] / picture[0], size[1] / picture[1]) <= resolution / least * (1 + 1e-9)
    if resolution == 512 and 1 / 2 <= picture[0] / picture[1] <= 2 and min(picture) > 500:
        assert max(part.cropped) < 0.08
    left, top, right, bottom = part.box
    assert 0 <= left < right <= picture[0]
    assert 0 <= top < bottom <= picture[1]
    assert nearest_bucket(picture[::-1], resolution, step) == size[::-1]


def test_steps_follow_the_model():
    assert bucket_step(512, latent_scale=8, unet_levels=4) == 64  # Stable Diffusion 1.5
    assert bucket_step(768, latent_scale=8, unet_levels=4) == 64
    assert bucket_step(64, latent_scale=4, unet_levels=3) == 8  # the embedded model
    assert bucket_step(16, latent_scale=8, unet_levels=4) == 8


def test_what_is_cropped_and_what_is_enlarged_is_said():
    tall = frame((3000, 4000), (448, 576))
    square = frame((60, 60), (64, 64))
    wide = frame((40, 30), (72, 56))
    names = ["a.jpg", "b.png", "c.png"]
    assert crop_note(names, [tall, square, wide]) == (
        "cropped: 4 % of the height of a.jpg, 4 % of the width of c.png"
    )
    assert crop_note(["b.png"], [square]) is None
    many = crop_note([f"{i}.jpg" for i in range(40)], [tall] * 40)
    assert many is not None
    assert many.endswith("4 % of the height of 11.jpg and 28 more")
    first, second = enlarged_notes(names, [tall, square, wide])
    assert first.startswith("b.png has 60 x 60 pixels and is enlarged to 64:")
    assert second.startswith("c.png has 40 x 30 pixels and is enlarged to 72 x 56:")


def test_another_place_than_the_middle_is_drawn():
    middle = frame((400, 100), (64, 64)).box
    drawn = {frame((400, 100), (64, 64), torch.Generator().manual_seed(i)).box[0] for i in range(9)}
    assert middle == (150, 0, 250, 100)
    assert len(drawn) > 5
