"""Writers in processes of their own: the kernel's limit, and a kill at any moment."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from cntlora_core.runtime import files
from cntlora_core.runtime.files import save_safetensors_atomic, write_json_atomic

from .conftest import names, posix

_IMPORT_FILES = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})  # alone: starts fast
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""


@posix
@pytest.mark.thorough
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
