"""``cntlora train --help`` shows what matters, ``--help-all`` all there is."""

from __future__ import annotations

import dataclasses
import re

import pytest

from cntlora_core.cli import main
from cntlora_core.commands.flags import SHOWN


def flags(capsys, *arguments: str) -> set[str]:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    for name in ("subject", "prior", "adapter", "training", "output"):
        assert f"{name} options" in text
    return set(re.findall(r"^[│|+ ]+(--\w[\w.-]*)", text, re.MULTILINE))


def test_help_shows_the_flags_that_matter_and_help_all_every_one(capsys):
    brief, everything = flags(capsys, "train", "--help"), flags(capsys, "train", "--help-all")
    assert brief < everything
    assert len(brief) <= 20
    assert {"--model", "--images", "--output", "--steps", "--method"} <= brief
    for settings in SHOWN:
        prefix = "--cntlora." if settings.__name__ == "CNTLoRAConfig" else "--"
        names = {f.name for f in dataclasses.fields(settings)} - {"cntlora", "constraint"}
        assert {prefix + name.replace("_", "-") for name in names} <= everything


def test_no_flag_says_what_another_says(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--cntlora.constraint", "cross"])
    assert "--cntlora.constraint" in capsys.readouterr().err


def test_a_flag_that_help_does_not_show_can_be_given(capsys, tmp_path):
    words = ["train", "--model", "small", "--images", str(tmp_path / "no"), "--token", "sks"]
    words += ["--class-name", "dog", "--output", str(tmp_path / "out"), "--lr-cycles", "3"]
    assert main(words) == 2
    assert "cosine_with_restarts" in capsys.readouterr().err
