"""The models and data that initialisations are measured on: full size, or tiny with ``quick``.

Weights are random unless a checkpoint is given: what is measured depends on shapes. Every sample is
a mapping with a leading dimension of 1, so that each method can be given the batches it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from cntlora_core.benchmark.init_settings import CaseName

Sample = Mapping[str, Tensor]


@dataclass(frozen=True)
class InitCase:
    """A model, where its adapters go, and what it reads.

    Attributes:
        title: For people.
        targets: Names of the modules that get an adapter.
        rank: Of each adapter (the mean, where ranks are shared out).
        build: From a checkpoint (or None) and ``quick`` to the model.
        samples: From the model and ``quick`` to the data.
        batch: Samples in a forward pass, for methods that are free to choose.
        masked: Whether samples have an ``attention_mask``.
    """

    title: str
    targets: tuple[str, ...]
    rank: int
    build: Callable[[Path | None, bool], nn.Module]
    samples: Callable[[nn.Module, bool], list[Sample]]
    batch: int
    masked: bool

    def lora_config(self, quick: bool, **more: Any) -> LoraConfig:
        """peft's configuration, with alpha twice the rank."""
        rank = 4 if quick else self.rank
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(self.targets), **more)


class TextToNoise(nn.Module):
    """Text encoder and denoiser of Stable Diffusion as one module, as an initialisation sees them.

    Attributes:
        text_encoder: Token ids (n, tokens) to states.
        unet: Latents (n, c, h, w), timesteps (n,) and states to predicted noise.
    """

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, latents: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """The predicted noise."""
        states = self.text_encoder(input_ids)[0]
        return self.unet(latents, timesteps, encoder_hidden_states=states).sample


def _stable_diffusion(checkpoint: Path | None, quick: bool) -> nn.Module:
    from cntlora_core.diffusion.family import SD15
    from cntlora_core.diffusion.pipeline import build_model, load_stable_diffusion

    if checkpoint is not None:
        parts = load_stable_diffusion(checkpoint)
        return TextToNoise(parts.text_encoder, parts.unet)
    if not quick:
        return TextToNoise(
            build_model("text_encoder", SD15.configs), build_model("unet", SD15.configs)
        )
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=998,
        eos_token_id=999,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return TextToNoise(CLIPTextModel(text), unet)


def _noised_images(model: nn.Module, quick: bool) -> list[Sample]:
    """Five images of 512 px under one prompt, noised at timesteps over the whole range."""
    side = 8 if quick else 64
    tokens = torch.randint(1, 900, (1, 77))
    return [
        {
            "latents": torch.randn(1, 4, side, side),
            "timesteps": torch.tensor([100 + 200 * i]),
            "input_ids": tokens,
        }
        for i in range(5)
    ]


def _roberta(checkpoint: Path | None, quick: bool) -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    if checkpoint is not None:
        return _from_folder(checkpoint)
    size = (32, 2, 2, 64) if quick else (1024, 24, 16, 4096)
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=size[0],
        num_hidden_layers=size[1],
        num_attention_heads=size[2],
        intermediate_size=size[3],
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    return RobertaModel(config, add_pooling_layer=False)


def _llama(checkpoint: Path | None, quick: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    if checkpoint is not None:
        return _from_folder(checkpoint)
    width, depth, heads, inner = (32, 2, 4, 64) if quick else (2048, 16, 32, 8192)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        intermediate_size=inner,
        max_position_embeddings=2048,
        use_cache=False,
    )
    return LlamaModel(config)


def _from_folder(folder: Path) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)


def _texts(count: int, tokens: int) -> Callable[[nn.Module, bool], list[Sample]]:
    def samples(model: nn.Module, quick: bool) -> list[Sample]:
        n, length = (4, 16) if quick else (count, tokens)
        vocabulary: int = model.config.vocab_size  # pyright: ignore
        return [
            {
                "input_ids": torch.randint(5, vocabulary, (1, length)),
                "attention_mask": torch.ones(1, length, dtype=torch.long),
            }
            for _ in range(n)
        ]

    return samples


INIT_CASES: dict[CaseName, InitCase] = {
    "sd15": InitCase(
        "Stable Diffusion 1.5, rank 128, 5 images of 512 px",
        ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"),
        128,
        _stable_diffusion,
        _noised_images,
        batch=1,
        masked=False,
    ),
    "roberta-large": InitCase(
        "RoBERTa-large, rank 16, 64 texts of 128 tokens",
        ("query", "key", "value", "attention.output.dense"),
        16,
        _roberta,
        _texts(64, 128),
        batch=8,
        masked=True,
    ),
    "llama-1b": InitCase(
        "a language model of 1.0 B parameters, rank 16, 8 texts of 512 tokens",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        16,
        _llama,
        _texts(8, 512),
        batch=1,
        masked=True,
    ),
}


def batches_of(samples: list[Sample], size: int) -> list[dict[str, Tensor]]:
    """The samples joined into batches of ``size``; the last may be smaller."""
    return [
        {key: torch.cat([sample[key] for sample in chosen]) for key in chosen[0]}
        for chosen in (samples[i : i + size] for i in range(0, len(samples), size))
    ]


def build_case(
    case: InitCase, checkpoint: Path | None, quick: bool, seed: int
) -> tuple[nn.Module, list[Sample]]:
    """The model, frozen and in eval mode, and the data; both drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.build(checkpoint, quick).eval().requires_grad_(False)
        return model, case.samples(model, quick)
