"""Bad input is an error in words, before any work and without a trace."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from cntlora_core.cli import main
from cntlora_core.diffusion.job import personalise

from .conftest import StopAt, change, command


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s, p: change(s, "training", device="abacus"), "abacus"),
        (lambda s, p: change(s, "subject", images=str(p / "none")), "none"),
        (lambda s, p: change(s, "subject", token="dog"), "share the word"),
        (lambda s, p: change(s, "subject", class_name=None), "class name"),
        (lambda s, p: change(s, "subject", resolution=33), "multiple of 2"),
        (lambda s, p: change(s, "adapter", rank=64), "more than their widths hold"),
        (lambda s, p: dataclasses.replace(s, model=str(p / "model.ckpt")), "model.ckpt"),
    ],
)
def test_bad_input_is_an_error_in_words(settings, tmp_path, spoil, words):
    with pytest.raises((ValueError, OSError), match=words):
        personalise(spoil(settings, tmp_path))


def test_the_command_says_errors_in_words_and_shows_no_trace(settings, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = change(settings, "subject", images=str(empty))
    done = subprocess.run(command(settings), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert str(empty.name) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/1").exists(), reason="needs /proc")
def test_an_unwritable_output_folder_is_said_before_any_work(settings):
    stages = StopAt(-1)
    with pytest.raises(OSError, match=r"cannot|not"):
        personalise(change(settings, "output", output="/proc/1/out"), reporter=stages)
    assert stages.stages == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--steps", "0"], "steps must be at least 1"), (["--rank", "0"], "rank must be at least 1")],
)
def test_flags_that_make_no_sense_are_refused_without_a_trace(capsys, flags, words):
    given = ["train", "--model", "m", "--images", "i", "--output", "o", *flags]
    assert main(given) == 2
    assert words in capsys.readouterr().err
