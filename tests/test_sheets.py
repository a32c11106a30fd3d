"""Pictures put together: what is where."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cntlora_core.figures.sheets import (
    before_and_after,
    caption_font,
    comparison_sheet,
    contact_sheet,
    loss_thumbnail,
    running_mean,
)


def flat(colour: str, width: int = 32, height: int = 32) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_a_contact_sheet_shows_every_picture_once() -> None:
    colours = ("red", "lime", "blue", "yellow", "cyan")
    sheet = contact_sheet([flat(c, 40, 20 + 9 * i) for i, c in enumerate(colours)], side=10)
    assert sheet.size == (30, 20)
    centres = [sheet.getpixel((10 * (i % 3) + 5, 10 * (i // 3) + 5)) for i in range(6)]
    assert centres == [flat(colour).getpixel((0, 0)) for colour in (*colours, "white")]


def test_a_comparison_has_a_cell_for_each_row_and_column() -> None:
    rows = [("one", [[flat("red")], [flat("lime")]]), ("two", [[flat("blue")], [flat("black")]])]
    sheet = comparison_sheet([], rows, ["left", "right " * 20], side=64)
    pixels = np.asarray(sheet).reshape(-1, 3)
    for colour in ("red", "lime", "blue"):
        count = int((pixels == flat(colour).getpixel((0, 0))).all(1).sum())
        assert count == 64 * 64, colour
    with_photos = comparison_sheet([flat("red")], rows, ["left", "right"], side=64)
    plain = comparison_sheet([], rows, ["left", "right"], side=64)
    assert with_photos.height > plain.height


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_before_and_after_has_the_photos_and_the_first_of_each_column_large(count: int) -> None:
    colours = ["red", "lime", "blue", "yellow"]
    rows = [
        ("a cat in the snow", [[flat("red"), flat("gray")], [flat("lime"), flat("gray")]]),
        ("a cat in space", [[flat("blue"), flat("gray")], [flat("yellow"), flat("gray")]]),
    ]
    words = ["photos", "before", "after"]
    photos = [flat("magenta"), *[flat("cyan")] * (count - 1)]
    sheet = before_and_after(photos, rows, words, words, side=100)
    pixels = np.asarray(sheet)

    def area(colour: str) -> int:
        return int((pixels == flat(colour).getpixel((0, 0))).all(2).sum())

    large = 206**2
    assert [area(c) for c in colours] == [100**2 + large] * 2 + [100**2] * 2
    assert area("magenta") == (206 - 68) ** 2
    assert area("cyan") == min(count - 1, 5) * 68**2


def test_words_below_and_above_pictures_are_broken_to_fit_their_column() -> None:
    rows = [("a very long prompt " * 5, [[flat("red")], [flat("lime")]])]
    words = ["photos", "some words " * 12, "first\nsecond"]
    sheet = np.asarray(before_and_after([flat("blue")], rows, words, words, side=150)).min(2)
    inked = (sheet < 250).any(0)
    assert not inked[:18].any()  # the margins between the columns
    for number in range(3):
        left = 18 + number * (150 + 18) + 150
        assert not inked[left + 1 : left + 17].any()


def test_captions_in_any_alphabet_have_letters() -> None:
    def drawn(text: str) -> list[int]:
        sheet = Image.new("L", (40, 40))
        ImageDraw.Draw(sheet).text((5, 5), text, fill="white", font=caption_font(20))
        return np.asarray(sheet).ravel().tolist()

    missing = drawn("\uffff")
    assert all(drawn(letter) != missing for letter in "aä\u0142\u0436\u03a9")


@pytest.mark.parametrize("losses", [[0.5], [0.1] * 7, list(np.linspace(1, 0.1, 300))])
def test_the_course_of_the_loss_can_be_drawn_at_any_step(losses: list[float]) -> None:
    picture = loss_thumbnail(losses, 300)
    assert picture.size == (384, 192)
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 2


def test_the_running_mean_is_that_of_the_window() -> None:
    values = np.arange(7, dtype=np.float64)
    expected = [np.mean(values[max(0, i - 2) : i + 1]) for i in range(7)]
    np.testing.assert_allclose(running_mean(values, window=3), expected)
