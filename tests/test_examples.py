"""The scripts of docs/examples run, and do what they say; fewer steps where steps are slow."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

EXAMPLES = Path(__file__).parent.parent / "docs/examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.thorough
def test_an_image_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lora = main_of("image_lora")(tmp_path / "penguin", steps=2, class_images=1, sampling=2)
    with safe_open(lora, "pt") as file:
        assert any("lora_down" in name for name in file.keys())  # noqa: SIM118
    assert (tmp_path / "penguin/snow.png").stat().st_size > 100


def test_a_text_classifier_learns(tmp_path: Path) -> None:
    loss = main_of("text_classifier")(tmp_path)
    assert loss < 0.9 * math.log(3)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_lava_on_a_convnet_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("lava_convnet")() > 0.9
    assert "trainable params" in capsys.readouterr().out


def test_every_example_is_run() -> None:
    text = Path(__file__).read_text("utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f'main_of("{script.stem}")' in text
