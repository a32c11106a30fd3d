"""Bad input is an error in words, before any work and without a trace."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from cntlora_core.cli import main
from cntlora_core.diffusion.job import personalise

from ..conftest import StopAt, change, command


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s, p: change(s, "training", device="abacus"), "abacus"),
        (lambda s, p: change(s, "subject", images=str(p / "none")), "none"),
        (lambda s, p: change(s, "subject", token="dog"), "share the word"),
        (lambda s, p: change(s, "subject", class_name=None), "class name"),
        (lambda s, p: change(s, "subject", resolution=33), "multiple of 8"),
        (lambda s, p: change(s, "adapter", rank=64), "more than their widths hold"),
        (lambda s, p: dataclasses.replace(s, model=str(p / "model.ckpt")), "model.ckpt"),
    ],
)
def test_bad_input_is_an_error_in_words(settings, tmp_path, spoil, words):
    with pytest.raises((ValueError, OSError), match=words):
        personalise(spoil(settings, tmp_path))


def test_the_command_says_errors_in_words_and_shows_no_trace(settings, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(command(change(settings, "subject", images=str(empty)))) == 1
    said = capsys.readouterr().err
    assert "error:" in said
    assert empty.name in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("state", "kohya"),
        ("STATE", "diffusers"),
        ("run.json", "peft"),
        ("loss.png", "peft"),
        ("samples", "peft"),
    ],
)
def test_a_name_that_the_run_itself_uses_is_refused_before_any_work(settings, name, layout):
    stages = StopAt(-1)
    with pytest.raises(ValueError, match="--name"):
        personalise(change(settings, "output", name=name, layout=layout), reporter=stages)
    assert stages.stages == []


def test_a_folder_where_the_lora_belongs_is_said_before_any_work(settings):
    stages = StopAt(-1)
    (Path(settings.output.output) / "mine.safetensors").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder"):
        personalise(change(settings, "output", name="mine"), reporter=stages)
    assert stages.stages == []


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("planted", ["cache/latents", "cache/class_images", "out put/samples"])
def test_a_folder_planted_as_a_link_is_not_written_through(settings, tmp_path, planted):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / planted).parent.mkdir(exist_ok=True)
    (tmp_path / planted).symlink_to(elsewhere)
    settings = change(settings, "training", steps=1, sample_prompts=("a dog",), sample_steps=2)
    with pytest.raises(OSError, match="symbolic link"):
        personalise(settings)
    assert list(elsewhere.iterdir()) == []


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
