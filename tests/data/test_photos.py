"""Folders of photos, good and bad."""

from __future__ import annotations

import io
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cntlora_core.data import pictures
from cntlora_core.data.photos import load_photos, photos_from_images


def picture(seed, size=(32, 24)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def names(photo_set):
    return [photo.path.name for photo in photo_set.photos]


@pytest.fixture
def folder(tmp_path):
    """Five photos in a folder with a space and letters beyond ASCII in its path."""
    folder = tmp_path / "mein Hünd 狗"
    folder.mkdir()
    for number in (1, 2, 3, 10, 20):
        picture(number).save(folder / f"IMG {number}.png")
    return folder


def test_natural_order_and_no_warnings(folder):
    found = load_photos(str(folder))
    assert names(found) == [f"IMG {n}.png" for n in (1, 2, 3, 10, 20)]
    assert found.skipped == ()
    assert found.warnings == ()
    assert [p.caption for p in found.photos] == [None] * 5
    assert np.array_equal(np.asarray(found.photos[3].image), np.asarray(picture(10)))
    assert len({p.digest for p in found.photos}) == 5


def test_digest_does_not_depend_on_the_file(folder, tmp_path):
    before = load_photos(folder)
    for photo in before.photos:
        photo.image.save(photo.path.with_suffix(".bmp"))
        photo.path.unlink()
    after = load_photos(folder)
    assert [p.digest for p in after.photos] == [p.digest for p in before.photos]
    assert [p.digest for p in photos_from_images([p.image for p in after.photos]).photos] == [
        p.digest for p in after.photos
    ]


def test_upper_case_hidden_files_and_subfolders(folder):
    picture(30).save(folder / "X.JPEG")
    (folder / ".hidden.png").write_bytes(b"no picture")
    (folder / "._IMG 1.png").write_bytes(b"what a Mac leaves")
    (folder / "Thumbs.db").write_bytes(b"what Windows leaves")
    (folder / "sub").mkdir()
    picture(31).save(folder / "sub" / "a.png")
    (folder / "folder.png").mkdir()
    found = load_photos(folder)
    assert names(found)[-1] == "X.JPEG"
    assert len(found.photos) == 6
    assert found.skipped == ()


def damaged(folder):
    """One file for each way to be unusable, and a word of the reason."""
    buffer = io.BytesIO()
    picture(0, (200, 200)).save(buffer, "JPEG")
    (folder / "b-cut.jpg").write_bytes(buffer.getvalue()[:4000])
    (folder / "b-empty.png").write_bytes(b"")
    (folder / "b-text.webp").write_text("hello")
    (folder / "b-noise.bmp").write_bytes(b"\0" * 60)
    (folder / "b-film.mp4").write_bytes(b"\0")
    (folder / "b-link.png").symlink_to(folder / "nowhere.png")
    return {
        "b-cut.jpg": "truncated",
        "b-empty.png": "0 bytes",
        "b-text.webp": "no picture",
        "b-noise.bmp": "no picture",
        "b-film.mp4": "not a known kind",
        "b-link.png": "No such file",
    }


def test_damaged_files_are_named_and_the_rest_is_used(folder):
    expected = damaged(folder)
    found = load_photos(folder)
    assert len(found.photos) == 5
    assert {s.path.name for s in found.skipped} == set(expected)
    for skipped in found.skipped:
        assert expected[skipped.path.name] in skipped.reason


def test_nothing_left_names_the_damaged_files(tmp_path):
    damaged(tmp_path)
    with pytest.raises(ValueError, match=r"b-cut\.jpg: damaged or incomplete.*and 1 more"):
        load_photos(tmp_path)


def test_random_damage_is_never_fatal(folder):
    """Any damage of any format leaves the other photos and an explanation."""
    rng = random.Random(0)
    for number in range(60):
        suffix = rng.choice(["png", "jpg", "gif", "webp", "tiff", "bmp"])
        buffer = io.BytesIO()
        picture(number).save(buffer, suffix.replace("jpg", "jpeg"))
        content = bytearray(buffer.getvalue())
        for _ in range(rng.choice([1, 5, 40])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            content = content[: rng.randrange(len(content))]
        (folder / f"x{number}.{suffix}").write_bytes(content)
    found = load_photos(folder)
    assert len(found.photos) + len(found.skipped) == 65
    assert names(found)[:5] == [f"IMG {n}.png" for n in (1, 2, 3, 10, 20)]
    assert found.skipped
    assert all(s.reason for s in found.skipped)


def test_a_bomb_is_named(folder, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 2000)
    picture(5, (50, 50)).save(folder / "panorama.png")
    found = load_photos(folder)
    assert len(found.photos) == 5
    assert "50 x 50 pixels" in found.skipped[0].reason
    assert "scale it down" in found.skipped[0].reason


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "mkfifo"), reason="no named pipes on this system"
)
def test_a_named_pipe_does_not_hang(folder):
    os.mkfifo(folder / "pipe.png")
    assert load_photos(folder).skipped[0].reason == "damaged or incomplete: not a regular file"


def test_wrong_folders(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nope"):
        load_photos(tmp_path / "nope")
    with pytest.raises(NotADirectoryError, match=r"give the folder it is in, .*Hünd"):
        load_photos(folder / "IMG 1.png")
    with pytest.raises(ValueError, match="empty"):
        load_photos("")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="the folder is empty"):
        load_photos(empty)
    (empty / "a.txt").write_text("x")
    (empty / ".hidden.png").write_text("x")
    with pytest.raises(ValueError, match=r"only other files \(a\.txt\)"):
        load_photos(empty)
    with pytest.raises(ValueError, match=r"only subfolders .*Hünd"):
        load_photos(tmp_path)


def test_one_photo_works_with_a_warning(tmp_path):
    picture(0).save(tmp_path / "a.png")
    found = load_photos(tmp_path)
    assert len(found.photos) == 1
    assert len(found.warnings) == 1
    assert "only one photo" in found.warnings[0]


def test_the_same_picture_twice_is_said(folder):
    picture(2).save(folder / "copy.bmp")
    assert load_photos(folder).warnings == (
        "IMG 2.png is the same picture as copy.bmp: it counts twice",
    )


def test_small_photos_are_said_and_large_ones_shrunk(folder):
    picture(7, (100, 64)).save(folder / "large.png")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    found = load_photos(folder, resolution=32)
    assert [w.split(" has ")[0] for w in found.warnings if "enlarged to 32" in w] == [
        *(f"IMG {n}.png" for n in (1, 2, 3, 10, 20)), "tiny.png",
    ]  # fmt: skip
    sizes = {n: p.image.size for n, p in zip(names(found), found.photos)}
    assert sizes["large.png"] == (100, 64)
    small = load_photos(folder, resolution=32, shrink=True)
    sizes = {n: p.image.size for n, p in zip(names(small), small.photos)}
    assert sizes["large.png"] == (50, 32)
    assert sizes["tiny.png"] == (1, 1)
    digests = {n: p.digest for n, p in zip(names(small), small.photos)}
    assert digests["large.png"] != found.photos[names(found).index("large.png")].digest
    with pytest.raises(ValueError, match="needs a resolution"):
        load_photos(folder, shrink=True)


def test_captions_beside_the_photos(folder):
    (folder / "IMG 1.txt").write_text("sks dog in Zürich\n", encoding="utf-8-sig")
    (folder / "IMG 2.caption").write_text("a {token} {class}\nasleep")
    (folder / "IMG 3.txt").write_text(" \n")
    (folder / "IMG 10.txt").write_bytes(b"caf\xe9")
    (folder / "IMG 20.TXT").write_text("loud")
    (folder / "IMG 4.txt").write_text("of a photo that is not there")
    found = load_photos(folder)
    assert [p.caption for p in found.photos] == [
        "sks dog in Zürich", "a {token} {class} asleep", None, None, "loud",
    ]  # fmt: skip
    assert len(found.warnings) == 3
    assert "IMG 3.txt is empty" in found.warnings[0]
    assert "IMG 10.txt is not UTF-8" in found.warnings[1]
    assert "IMG 4.txt is not used" in found.warnings[2]
    without = load_photos(folder, read_captions=False)
    assert [p.caption for p in without.photos] == [None] * 5
    assert without.warnings == ()


def test_images_in_memory():
    array = np.asarray(picture(1))
    found = photos_from_images(
        [picture(0), array, array.astype(np.float32) / 255, picture(3).convert("RGBA")],
        ["a", None, None, "d"],
    )
    assert [p.caption for p in found.photos] == ["a", None, None, "d"]
    assert all(p.path is None and p.image.mode == "RGB" for p in found.photos)
    assert found.photos[1].digest == found.photos[2].digest
    assert found.warnings == ("image 3 is the same picture as image 2: it counts twice",)
    given_image = picture(0)
    photos_from_images([given_image]).photos[0].image.putpixel((0, 0), (0, 0, 0))
    assert np.array_equal(np.asarray(given_image), np.asarray(picture(0)))  # a copy was taken


def test_images_in_memory_that_do_not_work(tmp_path):
    with pytest.raises(TypeError, match="in a list"):
        photos_from_images(picture(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"image 2 .* got str"):
        photos_from_images([picture(0), "a.png"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        photos_from_images([picture(0)], ["a", "b"])
    with pytest.raises(ValueError, match="no images"):
        photos_from_images([])
    picture(0, (200, 200)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:4000])
    with (
        Image.open(tmp_path / "a.jpg") as lazy,
        pytest.raises(ValueError, match=r"image 1 .*trunc"),
    ):
        photos_from_images([lazy])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000), unique=True, max_size=12), st.randoms())
def test_natural_order_is_numeric(numbers, rng):
    from pathlib import Path

    from cntlora_core.data.photos import natural_key

    paths = [Path(f"A{n}b.png") for n in numbers]
    rng.shuffle(paths)
    assert sorted(paths, key=natural_key) == [Path(f"A{n}b.png") for n in sorted(numbers)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8).filter(lambda t: "/" not in t), max_size=8))
def test_natural_order_takes_any_names(texts):
    from pathlib import Path

    from cntlora_core.data.photos import natural_key

    once = sorted(map(Path, texts), key=natural_key)
    backwards = once[::-1]
    assert sorted(backwards, key=natural_key) == once
