"""The registry as people and programs read it: command line, JSON, documentation, settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cntlora_core.cli import main
from cntlora_core.methods import METHODS, get_method, image_file_methods

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
EXPECTED = [
    "cross",
    "self",
    "shift",
    "lora",
    "lora_gaussian",
    "lora_orthogonal",
    "pissa",
    "pissa_niter_16",
    "olora",
    "eva",
    "corda_ipm",
    "corda_kpm",
    "lora_ga",
    "loftq",
    "dora",
    "adalora",
    "vera",
    "bitfit",
    "full",
]


def test_names_and_records():
    assert set(EXPECTED) <= set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert get_method(name) is method
        assert 20 < len(method.description) < 100
        assert method.paper or name == "full"
    assert get_method("pissa_niter_5").name == "pissa_niter_5"
    with pytest.raises(TypeError):
        METHODS["more"] = METHODS["lora"]  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("name", ["", "CorDA", "lora-ga", "pissa_niter_0", "pissa_niter_x"])
def test_an_unknown_name_is_answered_with_those_that_there_are(name):
    with pytest.raises(ValueError, match=re.escape(f"no method {name!r}")) as caught:
        get_method(name)
    assert all(known in str(caught.value) for known in METHODS)
    if name == "lora-ga":
        assert "Did you mean 'lora_ga'?" in str(caught.value)


def test_the_command_prints_every_method(capsys):
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == list(METHODS)
    for name, record in zip(METHODS, records, strict=True):
        assert re.search(rf"^ ?{name} ", table, re.MULTILINE)
        assert record["rewrites_base"] == METHODS[name].rewrites_base
        assert record["image_file"] == METHODS[name].image_file


def test_train_offers_the_methods_that_it_can_write(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    assert "{" + ",".join(image_file_methods()) + "}" in shown
    arguments = ["train", "--model", "m", "--images", "i", "--output", "o", "--method", "dora"]
    assert main(arguments) == 2
    assert "trains no image LoRA" in " ".join(capsys.readouterr().err.split())


def test_the_documentation_names_every_method_as_its_record_does():
    rows = {}
    for line in DOCS.read_text("utf-8").splitlines():
        if match := re.match(r"\| `(\w+)` \|", line):
            rows[match[1]] = [cell.strip() for cell in line.strip("|").split("|")]
    assert list(rows) == list(METHODS)
    files = {None: "none", "as trained": "r", "trained minus initial": "2r"}
    for name, method in METHODS.items():
        _, reads, base, up, file, paper = rows[name]
        assert reads in (method.needs, "the weight")
        assert (base in ("rewritten", "quantised")) == method.rewrites_base
        assert (up in ("zero", "")) == method.b_initialized_to_zero
        assert file == files[method.image_file]
        if method.paper.startswith("arXiv"):
            assert method.paper.split()[1] in paper or paper == "the same"


def test_the_registry_is_read_without_torch():
    code = "import sys, cntlora_core.commands.methods; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"
