"""A tiny transformer and data with padding and labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

Batch = dict[str, torch.Tensor]


@pytest.fixture
def make_base() -> Callable[..., nn.Module]:
    """The same small classifier each time, 24 wide, two layers."""

    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=64,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
            initializer_range=0.2,
        )
        return BertForSequenceClassification(config).eval().to(dtype)

    return make


@pytest.fixture
def make_config() -> Callable[..., LoraConfig]:
    def make(**options) -> LoraConfig:
        targets = ["query", "key", "value", "intermediate.dense"]
        return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **options})

    return make


@pytest.fixture
def make_data() -> Callable[..., list[Batch]]:
    """Twelve sentences; the last token of each is padding."""

    def make(batch_size: int = 4, tokens: int = 6, padding_token: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(5, 64, (12, tokens), generator=generator)
        labels = torch.randint(3, (12,), generator=generator)
        mask = torch.ones(12, tokens, dtype=torch.long)
        mask[:, -1] = 0
        ids[:, -1] = padding_token
        return [
            {
                "input_ids": ids[i : i + batch_size],
                "attention_mask": mask[i : i + batch_size],
                "labels": labels[i : i + batch_size],
            }
            for i in range(0, 12, batch_size)
        ]

    return make
