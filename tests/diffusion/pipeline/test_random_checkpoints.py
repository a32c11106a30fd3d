"""Random checkpoints depend on their seed only, and are the same in both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
from cntlora_core.diffusion.random_checkpoint import main, random_parts, write_random_checkpoint

from .conftest import assert_same, load_narrow


@pytest.mark.thorough
def test_script_writes_both_layouts_and_spares_what_is_there(narrow: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    written = write_random_checkpoint(
        tmp_path / "r.safetensors", configs=narrow, dtype=torch.float16, seed=5, report=lines.append
    )
    assert written == [tmp_path / "r.safetensors", tmp_path / "r"]
    assert len(lines) == 3
    assert sorted(item.name for item in tmp_path.iterdir()) == ["r", "r.safetensors"]
    half = load_stable_diffusion(tmp_path / "r")
    assert_same(half, load_narrow(tmp_path / "r.safetensors", narrow))
    parts = random_parts(narrow, seed=5)
    assert torch.equal(half.unet.conv_in.weight, parts.unet.conv_in.weight.half().float())
    assert main([str(tmp_path / "r"), "--layout", "diffusers"]) == 1


def test_random_parts_depend_on_the_seed_only(narrow: Path, made: StableDiffusionParts) -> None:
    state = torch.random.get_rng_state()
    assert_same(made, random_parts(narrow, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(
        made.unet.conv_in.weight, random_parts(narrow, seed=4).unet.conv_in.weight
    )
