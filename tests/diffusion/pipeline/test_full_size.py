"""The full size loads from both layouts, in little more memory than its weights take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from cntlora_core.diffusion.family import SD15
from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.diffusion.random_checkpoint import write_random_checkpoint

from .conftest import assert_same

MEASURE = """
import sys, torch
from cntlora_core.diffusion.pipeline import load_stable_diffusion
def peak():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) // 1024
before = peak()
parts = load_stable_diffusion(sys.argv[1], dtype=torch.float16)
size = sum(p.nbytes for m in (parts.unet, parts.vae, parts.text_encoder) for p in m.parameters())
print(before, peak(), size // 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_full_size_in_both_layouts_and_in_little_memory(tmp_path: Path) -> None:
    file, folder = write_random_checkpoint(tmp_path / "full", dtype=torch.float16)
    for path in (file, folder):
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
        )
        before, peak, size = map(int, result.stdout.split())
        # MiB: 859,520,964 and 123,060,480 parameters of two bytes, 83,653,863 (the VAE's) of four.
        assert size == 2193
        assert peak - before < 1.2 * size  # with a second copy of the denoiser it is 1.7
    one = load_stable_diffusion(file, dtype=torch.float16)
    assert (one.latent_scale, one.default_resolution) == (8, 512)
    assert_same(one, load_stable_diffusion(folder, dtype=torch.float16))
    one.vae.half()
    stock = StableDiffusionPipeline.from_single_file(
        str(file),
        config=str(SD15.configs),
        torch_dtype=torch.float16,
        local_files_only=True,
        safety_checker=None,
    )
    assert_same(one, stock)
