"""The number of threads goes by the model's size, and the process's setting comes back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cntlora_core.threads import threads, threads_for


def unet(pixels: int, width: int) -> SimpleNamespace:
    config = {"sample_size": pixels, "block_out_channels": (width, 2 * width)}
    return SimpleNamespace(config=config)


def test_small_models_get_one_thread_and_stable_diffusion_all() -> None:
    with threads(3):
        assert threads_for(unet(16, 64)) == 1
        assert threads_for(unet(64, 320)) == 3


def test_the_setting_comes_back_also_after_an_error() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with threads(before + 2):
            assert torch.get_num_threads() == before + 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
