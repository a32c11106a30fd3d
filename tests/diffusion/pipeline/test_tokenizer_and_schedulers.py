"""The tokenizer gives the published ids; every scheduler keeps SD1.5's noise schedule."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast, get_args

import diffusers
import pytest
import torch
from transformers import CLIPTokenizer

from cntlora_core.diffusion.checkpoint import read_json
from cntlora_core.diffusion.family import SD15
from cntlora_core.diffusion.pipeline import (
    SchedulerName,
    StableDiffusionParts,
    load_stable_diffusion,
)


def test_tokenizer_gives_the_known_ids() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(str(SD15.configs / "tokenizer"))
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A Photo of\n a   CAT").input_ids == tokenizer("a photo of a cat").input_ids
    assert tokenizer("").input_ids == [49406, 49407]
    assert tokenizer.model_max_length == 77
    assert tokenizer.pad_token_id == 49407
    assert len(tokenizer) == 49408


def test_vocabulary_follows_the_published_construction() -> None:
    folder = SD15.configs / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = (folder / "merges.txt").read_text("utf-8").splitlines()
    assert merges[0].startswith("#version")
    assert len(merges) == 1 + 48_894
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    assert list(vocabulary.values()) == list(range(49_408))
    assert names[256:512] == [symbol + "</w>" for symbol in names[:256]]
    assert names[512:-2] == ["".join(merge.split()) for merge in merges[1:]]
    assert names[-2:] == ["<|startoftext|>", "<|endoftext|>"]


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH is not set")
def test_vocabulary_is_that_of_comfyui() -> None:
    theirs = Path(os.environ["COMFYUI_PATH"]) / "comfy" / "sd1_tokenizer"
    ours = SD15.configs / "tokenizer"
    assert read_json(ours / "vocab.json") == read_json(theirs / "vocab.json")
    merges = [(folder / "merges.txt").read_text("utf-8").split() for folder in (ours, theirs)]
    assert merges[0] == merges[1]


@pytest.mark.parametrize("name", [None, *get_args(SchedulerName)])
def test_every_scheduler_samples(made: StableDiffusionParts, name: SchedulerName | None) -> None:
    pipeline = made.pipeline(name)
    assert pipeline.unet is made.unet
    assert made.default_resolution == 64  # diffusers sets it to 512 for configs before 0.9
    assert pipeline.scheduler.config["beta_schedule"] == "scaled_linear"
    if name is None:
        assert isinstance(pipeline.scheduler, diffusers.PNDMScheduler)
    images = cast(Any, pipeline("a cat", num_inference_steps=2, output_type="latent")).images
    assert torch.isfinite(images).all()


def test_unknown_scheduler_lists_the_known(made: StableDiffusionParts) -> None:
    with pytest.raises(ValueError, match=r"'dmp\+\+' is not one of pndm, ddim"):
        made.pipeline("dmp++")  # type: ignore[arg-type]


def test_noise_schedule_is_sd15s_own(made: StableDiffusionParts) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    wanted = torch.cumprod(1 - betas, 0)
    assert torch.allclose(made.noise_scheduler.alphas_cumprod.double(), wanted, rtol=1e-4)
    assert made.noise_scheduler.config["prediction_type"] == "epsilon"


def test_v_prediction_is_honoured_and_clipping_is_off_by_default(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text("utf-8")) | {"prediction_type": "v_prediction"}
    del config["clip_sample"]
    file.write_text(json.dumps(config), encoding="utf-8")
    parts = load_stable_diffusion(folder)
    for scheduler in (parts.noise_scheduler, parts.pipeline("ddim").scheduler):
        assert scheduler.config["prediction_type"] == "v_prediction"
        assert scheduler.config["clip_sample"] is False
