"""SDXL: what is loaded, how a prompt and an image's size are read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from cntlora_core.data.framing import frame
from cntlora_core.diffusion.checkpoint import CheckpointError
from cntlora_core.diffusion.family import SD15, SDXL, default_resolution, family_of
from cntlora_core.diffusion.pipeline import load_parts, load_stable_diffusion
from cntlora_core.diffusion.sampler import generate
from cntlora_core.diffusion.settings import SamplingSettings
from cntlora_core.diffusion.single_file import save_single_file

from .conftest import networks_of, prediction

PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def stock(tiny_sdxl):
    return StableDiffusionXLPipeline.from_pretrained(str(tiny_sdxl), add_watermarker=False)


def test_a_prompt_is_read_as_the_stock_pipeline_reads_it(tiny_sdxl, stock):
    parts = load_stable_diffusion(str(tiny_sdxl))
    assert parts.family is SDXL
    assert parts.default_resolution == default_resolution(tiny_sdxl) == 32
    assert parts.vae.dtype == torch.float32
    tokens = parts.tokens([PROMPT]).input_ids
    first, second = tokens.chunk(2, dim=1)
    end, padding = parts.tokenizer.eos_token_id, parts.tokenizers[1].pad_token_id
    assert padding == parts.tokenizer.get_vocab()["!"] != end
    assert torch.equal(first == end, (second == end) | (second == padding))
    found = SDXL.encode(parts.networks, tokens)
    with torch.no_grad():
        states, _, pooled, _ = stock.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    assert torch.equal(found.states, states)
    assert torch.allclose(found.pooled, pooled, atol=1e-6)


def test_clip_skip_reads_earlier_states_and_the_same_pooled_embedding(tiny_sdxl, stock):
    parts = load_stable_diffusion(str(tiny_sdxl), clip_skip=2)
    found = SDXL.encode(parts.networks, parts.tokens([PROMPT]).input_ids)
    with torch.no_grad():
        states, _, pooled, _ = stock.encode_prompt(
            PROMPT, do_classifier_free_guidance=False, clip_skip=1
        )
        again = parts.pipeline().encode_prompt(PROMPT, do_classifier_free_guidance=False)
    assert torch.equal(found.states, states)
    assert torch.allclose(found.pooled, pooled, atol=1e-6)
    assert torch.equal(again[0], states)
    assert torch.allclose(again[2], pooled, atol=1e-6)


def test_sizes_are_those_of_the_picture_and_of_what_is_kept_of_it():
    tall = frame((300, 500), (64, 64))  # resized to 64 x 107, of which 21 rows above are cut
    square = frame((32, 32), (32, 32))
    ids = SDXL.time_ids([tall, square])
    assert ids is not None
    assert ids.tolist() == [[500, 300, 21, 0, 64, 64], [32, 32, 0, 0, 32, 32]]
    assert SD15.time_ids([tall]) is None


@pytest.mark.parametrize("shape", [{}, {"width": 48, "height": 32}])
def test_generated_images_are_the_stock_pipeline_s(tiny_sdxl, stock, shape):
    ours = load_stable_diffusion(str(tiny_sdxl)).pipeline()
    assert ours.config.force_zeros_for_empty_prompt
    settings = SamplingSettings(steps=2, guidance=5.0, seed=3, **shape)
    (picture,) = generate(ours, [PROMPT], settings)
    (expected,) = stock(
        PROMPT, num_inference_steps=2, guidance_scale=5.0, **shape,
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    assert isinstance(picture, Image.Image)
    assert picture.size == (shape.get("width", 32), 32)
    off = np.abs(np.asarray(picture, int) - np.asarray(expected, int))
    assert off.max() <= 1  # rounding


def test_a_single_file_is_read_as_diffusers_reads_it(tiny_sdxl, stock, tmp_path):
    parts = load_stable_diffusion(str(tiny_sdxl))
    file = tmp_path / "one.safetensors"
    save_single_file(parts, file)
    assert family_of(file) is SDXL
    loaded = load_parts(file, tiny_sdxl, SDXL, source="it")
    for name, network in networks_of(stock).items():
        expected, found = network.state_dict(), loaded.networks[name].state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name
    assert torch.allclose(prediction(loaded.networks), prediction(networks_of(stock)), atol=1e-5)


def test_what_a_folder_says_of_itself_is_heeded(tiny_sdxl, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_sdxl, folder)
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    pipeline = load_stable_diffusion(str(folder)).pipeline()
    assert not pipeline.config.force_zeros_for_empty_prompt
    file.write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(CheckpointError, match="refiner"):
        load_stable_diffusion(str(folder))


def test_a_pooled_embedding_of_another_width_is_refused(tiny_sdxl, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_sdxl, folder)
    file = folder / "text_encoder_2" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projection_dim": 20}))
    weights = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"text_projection.weight": torch.ones(20, 48)}, weights)
    with pytest.raises(CheckpointError, match=r"pooled text embedding of width 24, .* makes 20"):
        load_stable_diffusion(str(folder))
