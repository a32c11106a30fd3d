"""HEIC, as phones write it: read with pillow-heif, refused with its name without."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from cntlora_core.data.photos import load_photos

HEIC_HEAD = b"\0\0\0\x18ftypheic" + b"\0" * 60
AVIF_HEAD = b"\0\0\0\x18ftypavif" + b"\0" * 60


@pytest.fixture
def folder(tmp_path):
    Image.linear_gradient("L").save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("name", ["phone.HEIC", "phone.jpg"])  # some phones call them JPEG
def test_without_the_package_it_is_named(folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (folder / name).write_bytes(HEIC_HEAD)
    (skipped,) = load_photos(folder).skipped
    assert (
        skipped.reason == "HEIC needs a package: pip install pillow-heif, or save it as JPEG or PNG"
    )


def test_avif_of_an_old_pillow_is_named(folder, monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    (folder / "a.avif").write_bytes(AVIF_HEAD)
    (skipped,) = load_photos(folder).skipped
    assert "AVIF needs Pillow 11.3 or newer: pip install --upgrade pillow" in skipped.reason


def test_with_the_package_it_is_read(folder):
    pytest.importorskip("pillow_heif", reason="pip install 'cntlora[heic]'")
    from pillow_heif import from_pillow  # pyright: ignore[reportMissingImports]

    rgb = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * i) for i in range(3)])
    heif = from_pillow(rgb)
    for name in ("b.HEIC", "c.jpg"):
        heif.save(folder / name, format="HEIF", quality=95)
    (folder / "d.heic").write_bytes(HEIC_HEAD)
    found = load_photos(folder)
    assert [photo.path.name for photo in found.photos] == ["a.png", "b.HEIC", "c.jpg"]
    for photo in found.photos[1:]:
        difference = np.asarray(photo.image, np.int64) - np.asarray(rgb, np.int64)
        assert np.abs(difference).mean() < 4
    assert [skipped.path.name for skipped in found.skipped] == ["d.heic"]
    assert "pip install" not in found.skipped[0].reason
