"""A tiny random model of SDXL's classes, as a diffusers folder, and what it predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cntlora_core.diffusion.family import SDXL, predict

from ...conftest import write_tokenizer


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths 32 and 48, two levels of the denoiser, images of 32 px."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    folder = tmp_path_factory.mktemp("tiny sdxl")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2")
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "!"}))
    tokenizers = [
        CLIPTokenizer.from_pretrained(str(folder / name)) for name in ("tokenizer", "tokenizer_2")
    ]
    torch.manual_seed(0)
    encoders = [
        kind(
            CLIPTextConfig(
                vocab_size=len(tokenizers[0]),
                hidden_size=width,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                projection_dim=24,
                bos_token_id=tokenizers[0].bos_token_id,
                eos_token_id=tokenizers[0].eos_token_id,
                pad_token_id=tokenizers[0].pad_token_id,
            )
        )
        for kind, width in ((CLIPTextModel, 32), (CLIPTextModelWithProjection, 48))
    ]
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=2,  # names in the original layout follow from it
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=80,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.13025,
    )
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(
            json.loads((SDXL.configs / "scheduler" / "scheduler_config.json").read_text())
        ),
        add_watermarker=False,
    ).save_pretrained(str(folder))
    return folder


def networks_of(pipeline: Any) -> dict[str, Any]:
    return {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}


@torch.no_grad()
def prediction(networks: Any) -> Tensor:
    """What the networks make of fixed tokens, sizes and latents."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = torch.randint(5, 200, (2, 2 * 77), generator=generator)
    sizes = torch.tensor([[48.0, 40, 0, 4, 32, 32], [32, 32, 0, 0, 32, 32]])
    conditioning = SDXL.encode(networks, tokens, sizes)
    return predict(networks["unet"], latents, torch.tensor([30, 700]), conditioning)
