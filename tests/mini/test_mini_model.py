"""The shipped small model: stock classes load it, it fits its size, and it does its work."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from cntlora_core import mini
from cntlora_core.mini.making.object_classes import OBJECT_CLASSES


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(mini.model_path() / "tokenizer")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(mini.model_path() / "vae")


def subject_pictures() -> torch.Tensor:
    """Two photos of every subject at 64 px, (n, 3, 64, 64) in -1..1."""
    rows = []
    for name in mini.subjects():
        for path in (mini.subject(name).photos / "0.png", mini.subject(name).held_out / "0.png"):
            with Image.open(path) as file:
                small = file.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
            rows.append(np.asarray(small, np.float32) / 127.5 - 1)
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def test_the_model_folder_is_small_and_float16():
    files = [path for path in mini.model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 34_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert kinds == {"F16"}, path


def test_no_file_is_a_pickle():
    for path in mini.model_path().rglob("*"):
        assert path.suffix not in {".bin", ".pt", ".ckpt", ".pkl"}


def test_the_unet_has_the_layout_of_stable_diffusion_1_5():
    unet = UNet2DConditionModel.from_pretrained(mini.model_path() / "unet")
    assert tuple(unet.config.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert tuple(unet.config.up_block_types) == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    assert unet.config.layers_per_block == 2
    projections = [
        name
        for name, _ in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    assert len(projections) == 128  # as many as in SD1.5's UNet


def test_the_text_encoder_fits_unet_and_tokenizer(tokenizer: CLIPTokenizer):
    text_encoder = CLIPTextModel.from_pretrained(mini.model_path() / "text_encoder")
    unet = json.loads((mini.model_path() / "unet" / "config.json").read_text(encoding="utf-8"))
    assert text_encoder.config.hidden_size == unet["cross_attention_dim"]
    assert text_encoder.config.vocab_size == len(tokenizer)
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id
    embedded = text_encoder(torch.tensor([tokenizer("a dog")["input_ids"]])).last_hidden_state
    other = text_encoder(torch.tensor([tokenizer("a cat")["input_ids"]])).last_hidden_state
    assert (embedded - other).abs().max() > 0.1


def test_the_scheduler_is_that_of_stable_diffusion_1_5():
    scheduler = PNDMScheduler.from_pretrained(mini.model_path() / "scheduler")
    config = scheduler.config
    assert (config.beta_start, config.beta_end) == (0.00085, 0.012)
    assert config.beta_schedule == "scaled_linear"
    assert config.steps_offset == 1
    assert config.prediction_type == "epsilon"
    assert config.skip_prk_steps


@pytest.mark.parametrize("text", ["a photo of a sks dog", "xyzzy qwfp 42", "zürich", "東京 😀"])
def test_any_text_is_encoded_and_comes_back(tokenizer: CLIPTokenizer, text: str):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]
    again = tokenizer.decode(ids, skip_special_tokens=True)
    assert again.replace(" ", "") == text.replace(" ", "")


def test_names_and_the_token_are_one_token_a_word(tokenizer: CLIPTokenizer):
    for word in [
        "sks",
        *(word for object_class in OBJECT_CLASSES for word in object_class.name.split()),
    ]:
        assert len(tokenizer(word)["input_ids"]) == 3, word


def test_padding_is_the_end_token_up_to_77(tokenizer: CLIPTokenizer):
    ids = tokenizer("a dog", padding="max_length", truncation=True)["input_ids"]
    assert len(ids) == 77
    assert set(ids[3:]) == {tokenizer.eos_token_id}


@torch.no_grad()
def test_the_autoencoder_keeps_drawings_that_it_never_saw(vae: AutoencoderKL):
    pictures = subject_pictures()
    latents = vae.encode(pictures).latent_dist.mean
    decoded = vae.decode(latents).sample.clamp(-1, 1)
    assert latents.shape == (len(pictures), 4, 16, 16)
    error = (decoded - pictures).pow(2).flatten(1).mean(1)
    decibels = 10 * torch.log10(4 / error)
    assert decibels.mean() > 29.5  # 30.5


@torch.no_grad()
def test_scaled_latents_have_the_deviation_of_the_card(vae: AutoencoderKL):
    latents = vae.encode(subject_pictures()).latent_dist.mean * vae.config.scaling_factor
    assert vae.config.scaling_factor == pytest.approx(0.18215)
    assert 0.35 < latents.std() < 0.7
    assert latents.mean((0, 2, 3)).abs().max() < 0.35


def test_a_background_prompt_decides_the_background():
    pipeline = StableDiffusionPipeline.from_pretrained(mini.model_path(), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    borders = {}
    for colour in ("red", "blue"):
        pictures = pipeline(
            [f"a photo of a dog on a {colour} background"] * 2,
            num_inference_steps=12,
            guidance_scale=2.5,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        assert pictures.shape == (2, 64, 64, 3)
        edge = np.concatenate([pictures[:, :4].reshape(-1, 3), pictures[:, -4:].reshape(-1, 3)])
        borders[colour] = np.median(edge, axis=0)
    assert borders["red"][0] > borders["red"][2] + 0.3
    assert borders["blue"][2] > borders["blue"][0] + 0.3
