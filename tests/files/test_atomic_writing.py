"""Atomic writing: an error of any kind leaves the old file, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat

import pytest
from safetensors import SafetensorError

from cntlora_core.runtime import files
from cntlora_core.runtime.files import (
    atomic_write,
    folder_within,
    require_writable_folder,
    write_json_atomic,
)

from .conftest import names, posix


def test_replaces_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "a b é.txt"
    target.write_text("old")
    with atomic_write(target) as temp:
        assert temp.parent == target.parent
        assert temp.name.startswith(".")
        assert temp.name.endswith(".tmp")
        temp.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == [target.name]


def test_missing_folders_are_made_and_long_names_work(tmp_path):
    target = tmp_path / "x" / "y" / ("n" * 250)
    with atomic_write(target) as temp:
        temp.write_bytes(b"1")
    assert target.read_bytes() == b"1"


@posix
def test_permissions_follow_the_umask(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("1")
    old = os.umask(0o027)
    try:
        write_json_atomic(path, 2)
    finally:
        os.umask(old)
    assert json.loads(path.read_text()) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@posix
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_planted_link_is_replaced_and_not_followed(tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    if kind == "file":
        elsewhere.write_text("precious")
    elif kind == "folder":
        elsewhere.mkdir()
    link = tmp_path / "shared" / "run.json"
    link.parent.mkdir()
    link.symlink_to(elsewhere)
    write_json_atomic(link, 2)
    assert not link.is_symlink()
    assert json.loads(link.read_text()) == 2
    assert names(link.parent) == ["run.json"]
    if kind == "file":
        assert elsewhere.read_text() == "precious"
    assert elsewhere.exists() == (kind != "nothing")


@posix
def test_a_linked_folder_is_followed_where_the_user_gave_it_and_refused_within(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    own = tmp_path / "own"
    own.symlink_to(real)
    write_json_atomic(own / "a.json", 1)
    assert names(real) == ["a.json"]
    assert folder_within(own, "cache", "latents").is_dir()
    (real / "samples").symlink_to(tmp_path)
    with pytest.raises(OSError, match="samples is a symbolic link"):
        folder_within(own, "samples")
    with pytest.raises(OSError, match="samples is a symbolic link"):
        folder_within(own, "samples", "more")


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_any_exception_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_write(target) as temp:  # noqa: PT012
        temp.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("library", ["python", "safetensors"])
def test_full_disk_is_explained(tmp_path, number, library):
    target = tmp_path / "a.bin"
    target.write_text("old")
    error = (
        OSError(number, os.strerror(number))
        if library == "python"
        else SafetensorError(f"Error while serializing: I/O error: none left (os error {number})")
    )
    with pytest.raises(OSError, match="untouched") as caught, atomic_write(target) as temp:  # noqa: PT012
        temp.write_bytes(b"12345")
        raise error
    assert caught.value.errno == number
    text = str(caught.value)
    assert str(target) in text
    assert "over 5 bytes" in text
    assert "free: " in text
    assert not text.startswith("[Errno")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.bin"]


def test_other_errors_of_safetensors_become_os_errors_or_pass(tmp_path):
    with pytest.raises(OSError, match="bad disk") as caught, atomic_write(tmp_path / "a"):
        raise SafetensorError(f"bad disk (os error {errno.EIO})")
    assert caught.value.errno == errno.EIO
    with pytest.raises(SafetensorError, match="other"), atomic_write(tmp_path / "a"):
        raise SafetensorError("other")
    with pytest.raises(OSError, match="mine"), atomic_write(tmp_path / "a"):
        raise OSError(errno.EIO, "mine")
    assert names(tmp_path) == []


def test_too_little_space_is_seen_before_writing(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    entered = False
    with (
        pytest.raises(OSError, match=r"Needed: 1(000000)?\.0 [TE]B; free: "),
        atomic_write(target, needed_bytes=10**18),
    ):
        entered = True
    assert not entered
    assert target.read_text() == "old"
    with pytest.raises(OSError, match=r"Needed: 1(000000)?\.0 [TE]B; free: ") as caught:
        require_writable_folder(tmp_path, 10**18)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["a"]


def test_stale_temps_go_and_living_or_foreign_ones_stay(tmp_path):
    target = tmp_path / "a"
    stale = tmp_path / ".a.0123abcd.tmp"
    foreign = [tmp_path / ".a.b.0123abcd.tmp", tmp_path / ".a.mine.tmp", tmp_path / "a.tmp"]
    for path in (stale, *foreign):
        path.write_text("x")
    with atomic_write(target) as outer:
        with atomic_write(target) as inner:  # a second writer while the first is at work
            assert outer.exists()
            inner.write_text("inner")
        outer.write_text("outer")
    assert target.read_text() == "outer"
    assert not stale.exists()
    assert all(path.exists() for path in foreign)


def test_folders_and_devices_are_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(ValueError, match="empty"), atomic_write(" "):
        pass
    if os.name != "nt":
        with pytest.raises(OSError, match="no regular file"), atomic_write("/dev/null"):
            pass


def test_a_target_held_by_another_program_is_explained(tmp_path, monkeypatch):
    target = tmp_path / "a"
    target.write_text("old")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(PermissionError, match="another program"), atomic_write(target) as temp:
        temp.write_text("new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_temp_of_a_vanished_folder_does_not_hide_the_error(tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:  # noqa: PT012
        temp = stack.enter_context(atomic_write(folder / "a"))
        temp.unlink()
        folder.rmdir()
        raise ZeroDivisionError
