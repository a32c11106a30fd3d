"""The main job on a model of SD1.5's full size: minutes each, several GB of memory and of disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from cntlora_core.diffusion.random_checkpoint import write_random_checkpoint
from cntlora_core.lora_file.writing import read_lora_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file SD1.5; CNTLORA_SD15_CHECKPOINT names one, else random weights are written."""
    given = os.environ.get("CNTLORA_SD15_CHECKPOINT")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("full size")
    write_random_checkpoint(folder / "sd15-random", layout="single")
    return next(folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CNTLORA_PHOTOS names a folder of real photos, else five pictures are drawn."""
    given = os.environ.get("CNTLORA_PHOTOS")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        image = Image.effect_noise((600, 520), 80).convert("RGB")
        ImageDraw.Draw(image).ellipse((100 + 20 * i, 90, 400, 420), fill=(200, 30 * i, 90))
        image.save(folder / f"{i}.jpg")
    return folder


@pytest.mark.parametrize(("resolution", "steps", "limit_gb"), [(256, 3, 9.0), (512, 2, 16.0)])
def test_photos_to_lora_at_full_size(checkpoint, photos, tmp_path, resolution, steps, limit_gb):
    clock = tmp_path / "clock.json"
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "cntlora_core.benchmark.stepclock", str(clock),
        "-m", "cntlora_core.cli", "train", "--model", str(checkpoint), "--images", str(photos),
        "--class-images", str(photos), "--token", "sks", "--class-name", "dog",
        "--output", str(out), "--cache", str(tmp_path / "cache"), "--device", "cpu",
        "--resolution", str(resolution), "--steps", str(steps), "--init-passes", "1",
        "--rank", "128", "--cntlora.rank-budget", "fixed", "--file-precision", "float16",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(clock.read_text())
    record = json.loads((out / "run.json").read_text())
    init = record["initialization"]
    ends = measured["step_ends"]
    print(
        f"\n{resolution} px: peak {measured['peak_bytes'] / 1e9:.2f} GB, last step "
        f"{ends[-1] - ends[-2]:.1f} s, {init['distinct_inputs']} distinct inputs, "
        f"{init['pass_seconds']:.0f} s of forward passes, "
        f"{init['solve_seconds']:.0f} s of linear algebra"
    )
    assert init["points"] == 176
    assert init["distinct_inputs"] == 65 + 24
    assert set(init["ranks"].values()) == {128}
    assert measured["peak_bytes"] < limit_gb * 1e9
    layers = read_lora_file(out / record["export"]["file"]).layers
    assert len(layers) == 176
    assert {layer.rank for layer in layers.values()} == {256}
