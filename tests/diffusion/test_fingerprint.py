"""The fingerprint of a model: every byte counts, and a large file is read once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cntlora_core.diffusion import fingerprint
from cntlora_core.diffusion.fingerprint import KEPT_NAME, fingerprint_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 8)
    return path


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of kept hashes, in a cache of its own; files of any size and age are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_LARGE", 1)
    monkeypatch.setattr(fingerprint, "_UNSETTLED", -(2**62))
    monkeypatch.setattr(fingerprint, "_known", {})
    return tmp_path / "cache" / "cntlora" / KEPT_NAME


@pytest.mark.parametrize("place", [0, 1, 700, 1500, 2047])
def test_a_change_of_any_byte_changes_the_fingerprint(model: Path, place: int) -> None:
    first = fingerprint_files([model])
    content = bytearray(model.read_bytes())
    content[place] ^= 1
    model.write_bytes(content)
    assert fingerprint_files([model]) != first


def test_the_hash_of_a_large_file_is_kept(model: Path, kept: Path, monkeypatch) -> None:
    first = fingerprint_files([model])
    assert fingerprint_files([model]) == first
    content = json.loads(kept.read_text())
    assert list(content) == [str(model.resolve())]
    content[str(model.resolve())][1] = "0" * 64  # shows that it is this hash that is taken
    kept.write_text(json.dumps(content))
    monkeypatch.setattr(fingerprint, "_known", {})
    assert fingerprint_files([model]) != first

    kept.write_text("[1, {")
    monkeypatch.setattr(fingerprint, "_known", {})
    assert fingerprint_files([model]) == first


def test_another_file_of_the_same_size_in_the_same_place_is_read_anew(model, kept) -> None:
    first = fingerprint_files([model])
    other = model.with_name("other")
    other.write_bytes(model.read_bytes()[::-1])
    other.replace(model)
    assert fingerprint_files([model]) != first
    assert kept.is_file()


def test_a_file_that_was_changed_just_now_is_not_kept(model, kept, monkeypatch) -> None:
    monkeypatch.setattr(fingerprint, "_UNSETTLED", 2**62)
    fingerprint_files([model])
    assert not kept.exists()


def test_long_reading_is_reported(model: Path, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(fingerprint, "SECONDS_OF_SILENCE", -1.0)
    fingerprint_files([model], lambda stage, done, total, values: told.append(stage))
    assert told == [fingerprint.STAGE]
