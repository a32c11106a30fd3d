"""What is said: of files that would hang or write to the terminal, of what is left out, of bugs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cntlora_core.lora_file.peft_config import matches_pattern
from cntlora_core.lora_file.writing import read_lora_file, write_lora_file
from cntlora_core.runtime.reading import printable
from cntlora_core.runtime.seeds import torch_seed

from .conftest import Run, Sound
from .test_files import sample_command


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("to_q", "a.b.to_q", True),
        ("to_q", "a.b.xto_q", False),
        ("^to_q", "a.to_q", False),
        (r"^a\.to_q", "a.to_q", True),
        (r"a\.to_q$", "x.a.to_q", True),
        (r".*attn2\.to_k", "down.0.attn2.to_k", True),
        (r"attn2\.to_k", "down.0.attn1.to_k", False),
        ("a.b", "axb", True),
        (r"a\.b", "axb", False),
    ],
)
def test_patterns_fit_as_pefts_do(pattern: str, name: str, fits: bool) -> None:
    assert matches_pattern(pattern, name) is fits
    assert bool(re.match(rf"(.*\.)?({pattern})$", name)) is fits


@pytest.mark.timeout(30, func_only=True)
@pytest.mark.parametrize("pattern", ["(a+)+b", "((.*)*)*x", ".*" * 400 + "x", "a" * 2000])
def test_inspect_does_not_hang_on_a_crafted_pattern(
    sound: Sound, run: Run, tmp_path: Path, pattern: str
) -> None:
    adapter = write_lora_file(
        tmp_path / "adapter", read_lora_file(sound.lora).layers, layout="peft"
    )
    config = adapter / "unet" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {pattern: 4}}))
    said = run(["inspect", str(adapter), "--no-pictures"])
    assert said.status == (0 if pattern.startswith(".*") else 1)


def test_terminal_escapes_of_a_file_are_shown_not_run(
    sound: Sound, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    evil = "\x1b]0;owned\x07\x1b[31mred :bug: [bold]"
    save_file(load_file(sound.lora), path, {"modelspec.title": evil, "cntlora.method": evil})
    said = run(["inspect", str(path), "--no-pictures"])
    assert said.status == 0
    assert "\x1b" not in said.out
    assert "\x07" not in said.out
    assert r"\x1b]0;owned\x07\x1b[31mred :bug: [bold]" in said.out


def test_what_of_a_lora_is_left_out_is_said(sound: Sound, run: Run, tmp_path: Path) -> None:
    tensors = load_file(sound.lora)
    first = next(key for key in tensors if key.endswith("lora_up.weight"))
    stem = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    tensors[first.replace("lora_up.weight", "dora_scale")] = torch.ones(tensors[first].shape[0], 1)
    tensors[f"{stem}.lora_down.weight"] = torch.ones(2, 32)
    tensors[f"{stem}.lora_up.weight"] = torch.ones(32, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    out = tmp_path / "out"
    said = run(sample_command(sound.model, out, "--lora", str(tmp_path / "x.safetensors")))
    assert "2 keys of a second text encoder" in said.err
    assert "is a DoRA: 1 magnitudes" in said.err


def test_seeds_of_any_size_differ() -> None:
    seeds = [0, 1, -1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63), 10**40]
    generated = {
        float(torch.randn(1, generator=torch.Generator().manual_seed(torch_seed(seed))))
        for seed in seeds
    }
    assert len(generated) == len(seeds)
    assert [torch_seed(seed) for seed in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]


def test_messages_keep_names_and_are_not_wrapped(run: Run, tmp_path: Path) -> None:
    name = f"{tmp_path}/a:bug:c [red] " + "long " * 60 + "end.safetensors"
    said = run(["inspect", name])
    assert said.status == 1
    assert name in said.err  # in one line, without an emoji


def test_an_unexpected_error_says_where_its_traceback_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cntlora_core import cli

    def defect(*_: object) -> None:
        raise KeyError("a defect of ours")

    monkeypatch.setattr(cli.Methods, "run", defect)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    said = run(["methods"])
    assert said.status == 1
    assert "Traceback" not in said.err
    found = re.search(r"written to (\S+)", said.err)
    assert found is not None
    assert found[1].startswith(str(tmp_path))
    written = Path(found[1]).read_text("utf-8")
    assert "a defect of ours" in written
    assert "test_words.py" in written


def test_printable_escapes_controls_and_keeps_text() -> None:
    assert printable("a:b:c é 犬\n\t") == "a:b:c é 犬\n\t"
    assert printable("\x1b[1m\r\x9b\udcff\u202e") == r"\x1b[1m\r\x9b\udcff\u202e"


SCRIPT = "import sys; from cntlora_core.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.thorough
def test_a_process_of_its_own_says_it_likewise(tmp_path: Path) -> None:
    """No home folder, and bytes that are not UTF-8, as only a real process has them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "inspect", b"\xff.safetensors"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert r"\udcff.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
