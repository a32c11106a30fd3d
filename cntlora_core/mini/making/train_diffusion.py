"""Train the small UNet and its text encoder.

``python -m cntlora_core.mini.making.train_diffusion``
"""

# diffusers wraps its methods in untyped decorators and annotates tuples of any length as of one:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cntlora_core.mini.making.loop import Budget, ExponentialAverage, optimise
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.memory import keep_freed_memory

__all__ = [
    "DiffusionConfig",
    "build_scheduler",
    "build_text_encoder",
    "build_unet",
    "diffusion_loss",
    "tokenize",
    "train",
]


@dataclass(frozen=True)
class DiffusionConfig:
    """Shape and training of the UNet and the text encoder.

    Attributes:
        channels: UNet channels per level.
        heads: attention heads (``attention_head_dim`` in diffusers' config, as in SD1.5).
        groups: groups of the UNet's group norms.
        text_width: width of the text encoder and of cross-attention.
        text_layers: layers of the text encoder.
        text_heads: attention heads of the text encoder.
        batch: samples a step.
        rate: peak learning rate of AdamW.
        warmup_steps: steps of linear warm-up.
        decay_from: part of the run after which the learning rate falls.
        thing_weight: weight of the loss where the objects are; 1 is that of the background.
        caption_dropout: part of the captions replaced by the empty one.
        snr_limit: as in min-SNR weighting (arXiv 2303.09556).
        snr_power: the epsilon loss weighs min(SNR, limit) ** power / SNR; 1 is min-SNR. Less than 1
            gives noisy timesteps, where the prompt's objects and colours are settled, their due.
        ema: decay of the averaged weights.
        muon: Muon for matrices and kernels instead of AdamW.
        bfloat16: autocast, and attention as plain products; for processors with AMX.
        seed: of weights, data order and noise.
    """

    channels: tuple[int, ...] = (64, 128, 128, 128)
    heads: int = 4
    groups: int = 16
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    batch: int = 16
    rate: float = 8e-4
    warmup_steps: int = 200
    decay_from: float = 0.6
    thing_weight: float = 3.0
    caption_dropout: float = 0.1
    snr_limit: float = 5.0
    snr_power: float = 0.5
    ema: float = 0.9985
    muon: bool = False
    bfloat16: bool = False
    seed: int = 2

    def __post_init__(self) -> None:
        if any(width % self.groups or width % self.heads for width in self.channels):
            raise ValueError(
                f"groups={self.groups} and heads={self.heads} must divide channels={self.channels}"
            )

    @classmethod
    def from_json(cls, values: dict) -> DiffusionConfig:
        """From a dict as JSON has it; an unknown key is a TypeError."""
        if "channels" in values:
            values = {**values, "channels": tuple(values["channels"])}
        return cls(**values)


def build_unet(config: DiffusionConfig) -> UNet2DConditionModel:
    """A UNet of SD1.5's block layout."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=config.channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,
        norm_num_groups=config.groups,
    )


def build_text_encoder(config: DiffusionConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text tower with 77 positions and SD1.5's activation."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=77,
            projection_dim=config.text_width,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> PNDMScheduler:
    """SD1.5's scheduler."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        prediction_type="epsilon",
    )


class LatentStream:
    """Batches of the encoded set; every pass has its own order, fixed by the seed."""

    def __init__(
        self, folder: Path, tokenizer: CLIPTokenizer, scaling: float, config: DiffusionConfig
    ) -> None:
        record = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        self.scaling, self.seed = scaling, config.seed
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        self.covers = np.load(folder / "covers.npy", mmap_mode="r")
        captions = (folder / "captions.txt").read_text(encoding="utf-8").splitlines()
        captions = captions[: record["done"]]
        self.count = len(captions)
        unique = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        self.caption_of = np.array([unique[caption] for caption in captions])
        self.tokens = tokenize(tokenizer, list(unique))
        self.empty = tokenize(tokenizer, [""])[0]
        self._pass, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scaled latents (size, 4, 16, 16) float32, token ids (size, 77) int64, covers 0..1."""
        per_pass = self.count // size
        number, at = divmod(step, per_pass)
        if number != self._pass:
            self._pass = number
            self._order = np.random.default_rng((self.seed, number)).permutation(self.count)
        chosen = np.sort(self._order[at * size : (at + 1) * size])
        latents = torch.from_numpy(self.latents[chosen].astype(np.float32)) * self.scaling
        covers = torch.from_numpy(self.covers[chosen].astype(np.float32) / 255)[:, None]
        return latents, self.tokens[torch.from_numpy(self.caption_of[chosen])].long(), covers


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions -> ids, int16 (n, 77)."""
    rows = tokenizer(captions, padding="max_length", max_length=77, truncation=True)["input_ids"]
    return torch.tensor(rows, dtype=torch.int16)


def diffusion_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    signal: torch.Tensor,
    config: DiffusionConfig,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    covers: torch.Tensor,
    noise: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """Epsilon loss, weighted by the signal-to-noise ratio and by where the objects are.

    Args:
        unet: the denoiser.
        text_encoder: stock CLIP text model.
        signal: (1000,) cumulative alphas.
        config: weights and precision.
        latents: (n, 4, h, w), scaled.
        tokens: (n, 77) ids.
        covers: (n, 1, h, w), 1 where an object is.
        noise: (n, 4, h, w), standard normal.
        steps: (n,) timesteps.

    Returns:
        Scalar.
    """
    alpha = signal[steps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
        states = text_encoder(tokens).last_hidden_state
        predicted = unet(noisy, steps, states).sample.float()
    snr = signal[steps] / (1 - signal[steps])
    weight = snr.clamp(max=config.snr_limit).pow(config.snr_power) / snr
    error = (1 + (config.thing_weight - 1) * covers) * (predicted - noise).pow(2)
    return (weight * error.flatten(1).mean(1)).mean()


def train(
    data: Path,
    vae: Path,
    output: Path,
    config: DiffusionConfig,
    budget: Budget,
    workers: int = 2,
    text: Path | None = None,
    start_from: Path | None = None,
    every: float = 120,
) -> None:
    """Train until the budget is spent; ``output/state.safetensors`` resumes.

    Args:
        data: folder made by ``mini.dataset``.
        vae: folder of the autoencoder (its scaling factor is read).
        output: folder of state and log.
        config: shape and training.
        budget: minutes or steps.
        workers: processes that share a batch.
        text: file of ``mini.pretrain_text`` to start the text encoder from.
        start_from: model folder to go on from, of the same shape and tokenizer, with a new
            optimizer.
        every: seconds between states.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
    torch.manual_seed(config.seed)
    unet = build_unet(config).to(memory_format=torch.channels_last)
    text_encoder = build_text_encoder(config, tokenizer)
    if config.bfloat16:
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")  # faster in bfloat16
    if start_from is not None:
        before = UNet2DConditionModel.from_pretrained(start_from / "unet")
        unet.load_state_dict(before.state_dict())
        words = CLIPTextModel.from_pretrained(start_from / "text_encoder", dtype=torch.float32)
        text_encoder.load_state_dict(words.state_dict())
    if text is not None:
        text_encoder.load_state_dict(load_file(text))
    signal = build_scheduler().alphas_cumprod
    scaling = json.loads((vae / "config.json").read_text(encoding="utf-8"))["scaling_factor"]
    stream = LatentStream(data, tokenizer, scaling, config)

    def batch_of(step: int) -> Sequence[torch.Tensor]:
        latents, tokens, covers = stream.batch(step, config.batch)
        tokens[torch.rand(len(tokens)) < config.caption_dropout] = stream.empty.long()
        steps = stratified_steps(config.batch, len(signal))
        return latents, tokens, covers, torch.randn_like(latents), steps

    def note(_average: ExponentialAverage) -> None:
        record = {"config": asdict(config), "steps": budget.step, "seconds": round(budget.elapsed)}
        write_json_atomic(output / "diffusion.json", record)

    optimise(
        output,
        trained_parameters(unet, text_encoder),
        partial(diffusion_loss, unet, text_encoder, signal, config),
        batch_of,
        config,
        budget,
        note,
        workers=workers,
        every=every,
        muon=config.muon,
    )


def stratified_steps(count: int, total: int) -> torch.Tensor:
    """One timestep from each of ``count`` equal spans of ``0..total - 1``, shuffled, (count,)."""
    steps = ((torch.arange(count) + torch.rand(count)) / count * total).long()
    return steps[torch.randperm(count)]


def trained_parameters(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of both networks, ``unet.`` and ``text_encoder.`` in front."""
    named = {f"unet.{name}": p for name, p in unet.named_parameters()}
    named.update({f"text_encoder.{name}": p for name, p in text_encoder.named_parameters()})
    return named


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder made by mini.dataset")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--text", type=Path, help="file of mini.pretrain_text to start from")
    parser.add_argument("--start-from", type=Path, help="folder of a model to go on from")
    parser.add_argument("--config", type=Path, help="JSON of a DiffusionConfig")
    args = parser.parse_args()
    budget = Budget(args.minutes, args.steps)
    values = json.loads(args.config.read_text(encoding="utf-8")) if args.config else {}
    config = DiffusionConfig.from_json(values)
    keep_freed_memory()
    train(
        args.data,
        args.vae,
        args.output,
        config,
        budget,
        args.workers,
        args.text,
        args.start_from,
    )


if __name__ == "__main__":
    main()
