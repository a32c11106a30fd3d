"""SD1.5's module tree at a fraction of its width, adapters on it, and how to compare them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cntlora_core.lora_file.writing import LoRALayers, collect_adapter, relative_error

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION,
    *["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"],
    *["time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"],
    *["time_embedding.linear_1", "time_embedding.linear_2"],
]
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
# Scaling alpha / r differs between layers, and so do alpha and r each on their own.
UNET_PATTERNS: dict[str, Any] = {
    "rank_pattern": {r".*attn2\.to_k": 2, r".*attn1\.to_q": 5},
    "alpha_pattern": {r".*attn2\.to_k": 7, r".*up_blocks\.1\..*to_v": 1},
}
TEXT_PATTERNS: dict[str, Any] = {
    "rank_pattern": {r".*layers\.1\.self_attn\.q_proj": 3},
    "alpha_pattern": {
        r".*layers\.1\.self_attn\.q_proj": 5,
        r".*layers\.11\.self_attn\.q_proj": 2,
    },
}
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """SD 1.5's module tree at a fraction of its width, so that every name is the real one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32, 64, 64),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=12,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=62,
                eos_token_id=63,
            )
        )
    return unet.eval(), text_encoder.eval()


def adapted(
    base: tuple[nn.Module, nn.Module], targets: list[str] = ATTENTION, **config: object
) -> tuple[PeftModel, PeftModel]:
    """Copies of both models with a random adapter (up is not zero)."""
    text_targets = [*TEXT_ATTENTION, "fc1", "fc2"] if "conv1" in targets else TEXT_ATTENTION
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet, text_encoder = (
            get_peft_model(
                copy.deepcopy(model),
                LoraConfig(
                    target_modules=names,
                    **{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **patterns, **config},
                ),
            )
            for model, names, patterns in (
                (base[0], targets, UNET_PATTERNS),
                (base[1], text_targets, TEXT_PATTERNS),
            )
        )
    return unet.eval(), text_encoder.eval()


def without_text_model(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """By the names that transformers 5 gives; transformers 4 puts ``text_model.`` before them."""
    return {name.removeprefix("text_model."): value for name, value in named}


def collect(models: tuple[nn.Module, nn.Module]) -> LoRALayers:
    return collect_adapter(models[0]) | collect_adapter(models[1], prefix="text_encoder")


@torch.no_grad()
def outputs(unet: nn.Module, text_encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """The denoiser's output for a prompt, and that prompt's embedding."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 60, (2, 16), generator=generator)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    states = text_encoder(tokens)[0]
    return unet(latents, torch.tensor([10, 700]), states).sample, states


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())


def stock_pipeline(base: tuple[nn.Module, nn.Module]) -> StableDiffusionPipeline:
    unet, text_encoder = copy.deepcopy(base)
    absent = ("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    parts: dict[str, Any] = {"unet": unet, "text_encoder": text_encoder, **dict.fromkeys(absent)}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@pytest.fixture
def loader_messages(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What diffusers and peft complain about while loading: a pattern or a key without a module."""
    from diffusers.utils import logging as diffusers_logging

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    diffusers_logging.add_handler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages += [str(w.message) for w in caught if "pattern" in str(w.message)]
    diffusers_logging.remove_handler(handler)
    left_over = [m for m in messages if "key" in m.lower() or "pattern" in m]
    assert not left_over


def assert_same_layers(actual: LoRALayers, expected: LoRALayers, tolerance: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, layer in expected.items():
        if tolerance:
            assert relative_error(actual[name], layer) < tolerance, name
            assert actual[name].rank == layer.rank
            continue
        assert torch.equal(actual[name].down, layer.down), name
        assert torch.equal(actual[name].up, layer.up), name
        assert actual[name].alpha == layer.alpha, name
        if layer.mid is not None:
            mid = actual[name].mid
            assert mid is not None, name
            assert torch.equal(mid, layer.mid), name
