"""Pictures put together: what is where."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cntlora_core.figures.sheets import (
    comparison_sheet,
    contact_sheet,
    loss_thumbnail,
    running_mean,
    with_hero_row,
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
    scored = comparison_sheet([], rows, ["left", "right"], side=64, below=["DINO 60", "DINO 70"])
    assert np.asarray(scored)[plain.height :].min() < 128


def test_the_hero_row_shows_the_photos_and_each_picture_large() -> None:
    sheet = flat("white", 900, 100)
    pictures = [("before", flat("red")), ("after", flat("lime"))]
    whole = np.asarray(with_hero_row(sheet, [flat("blue")] * 4, "a cat in the snow", pictures))
    areas = [int((whole == flat(c).getpixel((0, 0))).all(2).sum()) for c in ("red", "lime", "blue")]
    assert len(set(areas)) == 1
    assert areas[0] > 250**2


@pytest.mark.parametrize("losses", [[0.5], [0.1] * 7, list(np.linspace(1, 0.1, 300))])
def test_the_course_of_the_loss_can_be_drawn_at_any_step(losses: list[float]) -> None:
    picture = loss_thumbnail(losses, 300)
    assert picture.size == (384, 192)
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 2


def test_the_running_mean_is_that_of_the_window() -> None:
    values = np.arange(7, dtype=np.float64)
    expected = [np.mean(values[max(0, i - 2) : i + 1]) for i in range(7)]
    np.testing.assert_allclose(running_mean(values, window=3), expected)
