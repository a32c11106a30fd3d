"""Atomic writing: full disks, kills, interrupts, names."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cntlora_core import files
from cntlora_core.files import (
    atomic_write,
    format_bytes,
    require_writable_folder,
    safe_name,
    save_safetensors_atomic,
    write_json_atomic,
)

_IMPORT_FILES = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})  # alone: starts fast
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX semantics")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


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
def test_permissions_follow_the_umask_and_links_survive(tmp_path):
    real = tmp_path / "real.json"
    link = tmp_path / "link.json"
    real.write_text("1")
    link.symlink_to(real)
    old = os.umask(0o027)
    try:
        write_json_atomic(link, 2)
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert json.loads(real.read_text()) == 2
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


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
        pytest.raises(OSError, match=r"Needed: 1000000\.0 TB; free: "),
        atomic_write(target, needed_bytes=10**18),
    ):
        entered = True
    assert not entered
    assert target.read_text() == "old"
    with pytest.raises(OSError, match=r"Needed: 1000000\.0 TB; free: ") as caught:
        require_writable_folder(tmp_path, 10**18)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["a"]


@posix
def test_a_real_write_limit_in_another_process(tmp_path):
    """The kernel itself refuses the bytes (EFBIG), once for our writer and once for Rust's."""
    target = tmp_path / "a.safetensors"
    save_safetensors_atomic({"a": torch.ones(2)}, target)
    script = f"""
{_IMPORT_FILES}
import resource, torch
from safetensors.torch import save_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
def rust():
    with files.atomic_write({str(target)!r}) as temp:
        save_file({{"a": torch.zeros(10000)}}, temp)
def ours():
    files.save_safetensors_atomic({{"a": torch.zeros(10000)}}, {str(target)!r})
for write in (ours, rust):
    try:
        write()
    except OSError as error:
        print(error.errno, error)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(out) == 2
    assert all(line.startswith(f"{errno.EFBIG} cannot write {target}") for line in out)
    assert "Needed: 40.1 kB" in out[0]
    assert torch.equal(load_file(target)["a"], torch.ones(2))
    assert names(tmp_path) == [target.name]


_WRITER = (
    _IMPORT_FILES
    + """
path, size = sys.argv[1], 3_000_000
print("ready", flush=True)
for number in range(10**9):
    byte = bytes([97 + number % 26])
    with files.atomic_write(path) as temp, temp.open("wb") as file:
        for _ in range(3):
            file.write(byte * (size // 3))
            file.flush()
"""
)


@posix
def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    target = tmp_path / "state.bin"
    target.write_bytes(b"a" * 3_000_000)
    rng = random.Random(0)
    left_behind = 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(target)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        content = target.read_bytes()
        assert len(content) == 3_000_000
        assert content == content[:1] * 3_000_000
        assert len(names(tmp_path)) <= 2  # each run has removed what the one before left
        left_behind += len(names(tmp_path)) - 1
    assert left_behind > 0, "no kill fell into a write: the test shows nothing"
    write_json_atomic(target, {})
    assert names(tmp_path) == ["state.bin"]


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


@pytest.mark.parametrize(
    "value", [{"loss": float("nan")}, [float("inf")], {"a": object()}, {(1, 2): 3}]
)
def test_json_that_is_not_json_touches_nothing(tmp_path, value):
    target = write_json_atomic(tmp_path / "a.json", {"é": [1, "x"]})
    with pytest.raises((TypeError, ValueError), match=r"a\.json"):
        write_json_atomic(target, value)
    assert json.loads(target.read_text(encoding="utf-8")) == {"é": [1, "x"]}
    assert names(tmp_path) == ["a.json"]


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(), max_size=20))
def test_json_keeps_any_text(text):
    with tempfile.TemporaryDirectory() as folder:
        path = write_json_atomic(Path(folder) / "a.json", {text: text})
        assert json.loads(path.read_text(encoding="utf-8")) == {text: text}


def test_safetensors_views_aliases_and_metadata(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "all": base,
        "again": base,
        "row": base[1],
        "turned": base.T,
        "half": base.to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = save_safetensors_atomic(tensors, tmp_path / "a.safetensors", {"who": "é"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"who": "é"}
    with pytest.raises(TypeError, match=r"json\.dumps"):
        save_safetensors_atomic(tensors, path, {"rank": 4})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"'a' must be a torch\.Tensor"):
        save_safetensors_atomic({"a": [1]}, path)  # type: ignore[dict-item]
    assert load_file(path).keys() == tensors.keys()


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of sks dog", "a_photo_of_sks_dog"),
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\Users\\x", "C_Users_x"),
        (".hidden", "hidden"),
        ("-rf", "rf"),
        ("café.png", "cafe.png"),
        ("name.", "name"),
        ("con", "name-con"),
        ("LPT1.txt", "name-LPT1.txt"),
        ("console", "console"),
        ("", "unnamed"),
        ("dog \N{DOG FACE}", "dog"),
    ],
)
def test_safe_name_examples(text, expected):
    assert safe_name(text) == expected


def test_safe_name_tells_lost_text_apart():
    assert safe_name("小狗") != safe_name("小猫")
    assert safe_name("dog 小狗") != safe_name("dog 小猫")
    long = "x" * 200
    assert safe_name(long + "a") != safe_name(long + "b")
    with pytest.raises(ValueError, match="at least 20"):
        safe_name("x", max_length=5)


_AWKWARD = st.sampled_from(["/", "\\", "..", ".", "con", "NUL", " ", "\0", "é", "-", "_", "\ud800"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), _AWKWARD), max_size=12), st.integers(20, 90))
def test_safe_name_is_always_a_plain_name(parts, limit):
    name = safe_name("".join(parts), max_length=limit)
    assert 1 <= len(name) <= limit
    assert name.isascii()
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert name[0] not in ".-"
    assert not name.endswith(".")
    assert name.split(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}
    assert safe_name(name, max_length=limit) == name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text("")
        assert path.resolve().parent == Path(folder).resolve()


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 999, 1000, 1_500_000, 2_000_000_000, 3 * 10**12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "1.5 MB", "2.0 GB", "3.0 TB",
    ]  # fmt: skip


def test_temp_of_a_vanished_folder_does_not_hide_the_error(tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:  # noqa: PT012
        temp = stack.enter_context(atomic_write(folder / "a"))
        temp.unlink()
        folder.rmdir()
        raise ZeroDivisionError
