"""Folders to write to: made and left clean, or the obstacle is named."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from cntlora_core.runtime.files import atomic_write, require_writable_folder, write_json_atomic

from .conftest import names, posix


@pytest.fixture
def plain_user():
    """A folder in which permissions count: root drops its rights for the length of the test."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        was_root = hasattr(os, "geteuid") and os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if was_root:
                os.seteuid(0)
            for path in (Path(folder), *Path(folder).rglob("*")):
                if path.is_dir():
                    os.chmod(path, 0o777)


def test_writable_folder_is_made_and_left_clean(tmp_path):
    folder = require_writable_folder(tmp_path / "a b" / "ü", 1000)
    assert folder.is_dir()
    assert names(folder) == []
    with pytest.raises(ValueError, match="empty"):
        require_writable_folder("")


def test_a_file_in_the_way_is_named(tmp_path):
    blocker = tmp_path / "out"
    blocker.write_text("x")
    for folder in (blocker, blocker / "a" / "b"):
        with pytest.raises(NotADirectoryError) as caught:
            require_writable_folder(folder)
        assert f"{blocker} is a file" in str(caught.value)
    with (
        pytest.raises(NotADirectoryError, match="is a file"),
        atomic_write(blocker / "a.json"),
    ):
        pass


@posix
def test_an_unwritable_folder_is_named(plain_user):
    locked = plain_user / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    for folder in (locked, locked / "new"):
        with pytest.raises(PermissionError) as caught:
            require_writable_folder(folder)
        assert str(folder) in str(caught.value)
        assert "permissions" in str(caught.value)
    with pytest.raises(PermissionError, match="locked"):
        write_json_atomic(locked / "a.json", 1)
