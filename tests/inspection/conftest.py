"""Small models of several makes with random adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from cntlora_core.lora_file.algebra import LoRALayer


def layer_of(down: tuple[int, ...], up: tuple[int, ...], alpha: float = 3.0) -> LoRALayer:
    return LoRALayer(torch.randn(down), torch.randn(up), alpha)


def randomise(model: nn.Module) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def bert(**config: Any) -> Any:
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
        )
    )
    targets = config.pop("target_modules", ["query", "value", "intermediate.dense"])
    return randomise(get_peft_model(base, LoraConfig(target_modules=targets, **config)))


@pytest.fixture(scope="session")
def adapted_unet() -> Any:
    """A small UNet of SD1.5's make with an adapter on attention and convolutions."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "to_k", "to_out.0", "conv1"],
        rank_pattern={r".*attn2\.to_k": 2},
        alpha_pattern={r".*attn2\.to_k": 7},
    )
    unet.add_adapter(config)
    return randomise(unet)
