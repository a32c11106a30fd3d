"""The number of threads goes by the model's size, and the process's setting comes back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cntlora_core.metrics.encoders import SMALL, load_encoders
from cntlora_core.runtime.threads import threads, threads_for, threads_for_encoder


def unet(pixels: int, width: int) -> SimpleNamespace:
    config = {"sample_size": pixels, "block_out_channels": (width, 2 * width)}
    return SimpleNamespace(config=config)


def test_small_models_get_one_thread_and_stable_diffusion_all() -> None:
    with threads(3):
        assert threads_for(unet(16, 64)) == 1
        assert threads_for(unet(16, 64), 24) == 3
        assert threads_for(unet(64, 320)) == 3


def test_small_encoders_get_one_thread_and_those_of_the_protocol_all() -> None:
    with threads(3):
        small = SimpleNamespace(image_size=64, patch_size=8, hidden_size=160)
        dino = SimpleNamespace(image_size=[224, 224], patch_size=16, hidden_size=384)
        assert threads_for_encoder(small) == 1
        assert threads_for_encoder(dino) == 3


def test_encoders_keep_the_process_s_number_and_use_their_own() -> None:
    encoders = load_encoders(SMALL, SMALL)
    clip = encoders.clip.model
    within = []
    for tower in (encoders.dino.model, clip.vision_model, clip.text_model):
        tower.register_forward_pre_hook(lambda *_: within.append(torch.get_num_threads()))
    with threads(2):
        for encoder in (encoders.dino, encoders.clip):
            encoder.encode_images([Image.new("RGB", (8, 8))])
        encoders.clip.encode_prompts(["a dog"])
        assert torch.get_num_threads() == 2
    assert within == [1, 1, 1]


def test_the_setting_comes_back_also_after_an_error() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with threads(before + 2):
            assert torch.get_num_threads() == before + 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
