"""Train the small model's AutoencoderKL.

``python -m cntlora_core.mini.making.train_autoencoder``
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
from diffusers import AutoencoderKL
from PIL import Image
from transformers import ViTModel

from cntlora_core.mini import encoder_path
from cntlora_core.mini.making.compose import (
    ComposeConfig,
    Composer,
    Placement,
    any_background,
    paste,
    render_background,
)
from cntlora_core.mini.making.loop import Budget, ExponentialAverage, optimise
from cntlora_core.mini.making.sprites import SpriteSource
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.memory import keep_freed_memory

__all__ = ["AutoencoderConfig", "build_autoencoder", "psnr", "to_tensor", "train"]

SCALING_FACTOR = 0.18215  # SD1.5's
# Deviation of the scaled latents. Less than 1: a plain background shines through the noise of even
# the last timestep if its latents are large, and the prompt then goes unheeded (arXiv 2301.10972).
LATENT_DEVIATION = 0.5


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and training of the autoencoder.

    Attributes:
        channels: channels per level; each level but the last halves the side.
        layers_per_block: residual blocks per level (the decoder has one more).
        latent_channels: channels of the latents.
        batch: pictures a step.
        rate: peak learning rate of AdamW.
        warmup_steps: steps of linear warm-up.
        decay_from: part of the run after which the learning rate falls.
        kl_weight: weight of the Kullback-Leibler term, per latent value.
        edge_weight: weight of the L1 loss of differences between neighbours.
        square_weight: weight of the squared error beside the L1 loss.
        ema: decay of the averaged weights.
        muon: Muon for matrices and kernels instead of AdamW.
        bfloat16: autocast; for processors with AMX.
        latent_noise: greatest deviation of the noise that latents get while training, as a part of
            their own; each picture has a level of its own between 0 and this. What the UNet
            generates is never exact, and a decoder that knows clean latents only smears it.
        feature_weight: weight of the difference between picture and reconstruction as the small
            self-supervised encoder (``encoders/vision``) sees them.
        decoder_only: leave the encoder, and so the latents, as they are.
        seed: of weights, data and noise.
    """

    channels: tuple[int, ...] = (24, 48, 96)
    layers_per_block: int = 1
    latent_channels: int = 4
    batch: int = 16
    rate: float = 2e-3
    warmup_steps: int = 100
    decay_from: float = 0.35
    kl_weight: float = 1e-4
    edge_weight: float = 0.5
    square_weight: float = 2.0
    ema: float = 0.998
    muon: bool = False
    bfloat16: bool = False
    latent_noise: float = 0.0
    feature_weight: float = 0.0
    decoder_only: bool = False
    seed: int = 1

    @classmethod
    def from_json(cls, values: dict) -> AutoencoderConfig:
        """From a dict as JSON has it; an unknown key is a TypeError."""
        if "channels" in values:
            values = {**values, "channels": tuple(values["channels"])}
        return cls(**values)


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """A new AutoencoderKL; its scaling factor is set after training."""
    levels = len(config.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=64,
    )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB per picture; (n, 3, h, w) in -1..1 -> (n,)."""
    error = (first.clamp(-1, 1) - second.clamp(-1, 1)).pow(2).flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-12))


class PictureStream:
    """Pictures for the autoencoder: half captioned samples, half any emoji of the three styles."""

    def __init__(self, source: SpriteSource, seed: int) -> None:
        self.composer = Composer(source, ComposeConfig(), seed)
        self.sprites = source.everything()
        self.seed = seed

    def batch(self, step: int, size: int) -> np.ndarray:
        """uint8 (size, 64, 64, 3); the same for the same step."""
        return np.stack([self._picture(step * size + i) for i in range(size)])

    def _picture(self, index: int) -> np.ndarray:
        if index % 2:
            return self.composer.sample(index)[0]
        rng = np.random.default_rng((self.seed + 1, index))
        image = render_background(any_background(rng), rng, 64)
        for _ in range(rng.integers(1, 3)):
            sprite = self.sprites[rng.integers(len(self.sprites))]
            at = (rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8))
            flip = bool(rng.random() < 0.5)
            paste(image, sprite, Placement(rng.uniform(0.3, 0.9), at, rng.uniform(-25, 25), flip))
        return np.clip(image.round(), 0, 255).astype(np.uint8)


def autoencoder_loss(
    model: AutoencoderKL,
    config: AutoencoderConfig,
    vision: ViTModel | None,
    pictures: torch.Tensor,
    noise: torch.Tensor,
    level: torch.Tensor,
) -> torch.Tensor:
    """Reconstruction plus the weighted KL and feature terms.

    Args:
        model: the autoencoder.
        config: the weights of the terms.
        vision: encoder of the feature term, frozen; None leaves the term out.
        pictures: (n, 3, h, w) in -1..1.
        noise: (n, 4, h / 4, w / 4), standard normal.
        level: (n, 1, 1, 1), deviation of the noise beside the posterior's, as a part of the
            latents'.

    Returns:
        Scalar.
    """
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
        with torch.set_grad_enabled(not config.decoder_only):
            latent = model.encode(pictures).latent_dist
        spread = latent.mean.detach().std((0, 2, 3), keepdim=True)
        decoded = model.decode(latent.mean + (latent.std + level * spread) * noise).sample.float()
    error = decoded - pictures
    down, across = error.diff(dim=2), error.diff(dim=3)
    edges = down.abs().mean() + across.abs().mean()
    kl = 0.5 * (latent.mean.pow(2) + latent.var - 1 - latent.logvar).float().mean()
    loss = (
        error.abs().mean()
        + config.square_weight * error.pow(2).mean()
        + config.edge_weight * edges
        + config.kl_weight * kl
    )
    if vision is None:
        return loss
    with torch.no_grad():
        wanted = vision(pixel_values=pictures, output_hidden_states=True).hidden_states
    seen = vision(pixel_values=decoded, output_hidden_states=True).hidden_states
    return loss + config.feature_weight * feature_difference(seen, wanted)


def load_vision() -> ViTModel:
    """The shipped self-supervised encoder, frozen, in float32."""
    vision = ViTModel.from_pretrained(
        encoder_path("vision"), add_pooling_layer=False, dtype=torch.float32
    )
    return vision.eval().requires_grad_(False)


def feature_difference(
    seen: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean over layers of the relative squared difference; (n, tokens, width) each -> scalar."""
    layers = [
        (a - b).pow(2).mean() / b.var().clamp_min(1e-6) for a, b in zip(seen, wanted, strict=True)
    ]
    return torch.stack(layers).mean()


@torch.no_grad()
def whiten_latents(model: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give the latents of ``pictures`` mean 0, no correlation and one deviation, in place.

    Scaled with SD1.5's factor, the deviation is ``LATENT_DEVIATION``.

    The 1 x 1 convolutions around the latents absorb it: reconstructions of the mean latents stay
    the same, and no direction of the latents is left to weak gradients. The posterior's spread
    becomes its mean, one constant a channel.
    """
    moments = torch.cat([model.encode(part).latent_dist.parameters for part in pictures.split(32)])
    mean, logvar = moments.double().transpose(0, 1).flatten(1).chunk(2)
    centre = mean.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(mean))
    spread = values.clamp_min(1e-6 * values.max()).sqrt()
    stretch = LATENT_DEVIATION / (SCALING_FACTOR * spread)
    forward = vectors @ torch.diag(stretch) @ vectors.T
    backward = vectors @ torch.diag(1 / stretch) @ vectors.T
    variance = forward.square() @ logvar.clamp(-30, 20).exp().mean(1)
    channels = len(centre)
    before, after = model.quant_conv, model.post_quant_conv
    assert before is not None
    assert after is not None
    assert before.bias is not None
    assert after.bias is not None
    decode = after.weight[:, :, 0, 0].double()
    after.bias.copy_(after.bias + decode @ centre)
    after.weight.copy_((decode @ backward)[:, :, None, None])
    encode, shift = before.weight[:channels, :, 0, 0].double(), before.bias[:channels].double()
    before.weight[:channels] = (forward @ encode)[:, :, None, None].float()
    before.bias[:channels] = (forward @ (shift - centre)).float()
    before.weight[channels:] = 0
    before.bias[channels:] = variance.log().float()


@torch.no_grad()
def evaluate(model: AutoencoderKL, pictures: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Mean PSNR (dB), standard deviation of the latents, reconstructions."""
    latents = torch.cat([model.encode(part).latent_dist.mean for part in pictures.split(32)])
    decoded = torch.cat([model.decode(part).sample for part in latents.split(32)])
    return psnr(decoded, pictures).mean().item(), latents.std().item(), decoded


def save_pairs(path: Path, pictures: torch.Tensor, decoded: torch.Tensor, count: int = 12) -> None:
    """Pictures above, reconstructions below."""
    rows = torch.cat([torch.cat(list(x[:count]), dim=2) for x in (pictures, decoded)], dim=1)
    array = rows.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).resize((array.shape[1] * 2, array.shape[0] * 2), 0).save(path)


def train(
    node_modules: Path,
    output: Path,
    config: AutoencoderConfig,
    budget: Budget,
    workers: int = 2,
    start_from: Path | None = None,
    every: float = 180,
) -> None:
    """Train until the budget is spent; ``output/state.safetensors`` resumes, ``output/vae`` is it.

    Args:
        node_modules: where the emoji are.
        output: folder of state, log and result.
        config: shape and training.
        budget: minutes or steps.
        workers: processes that share a batch.
        start_from: folder of an autoencoder to go on from with a new optimizer.
        every: seconds between states.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = build_autoencoder(config)
    if start_from is not None:
        model.load_state_dict(AutoencoderKL.from_pretrained(start_from).state_dict())
    model = model.to(memory_format=torch.channels_last)
    named = dict(model.named_parameters())
    if config.decoder_only:
        named = {n: p for n, p in named.items() if n.startswith(("decoder.", "post_quant_conv."))}
    vision = load_vision() if config.feature_weight else None
    source = SpriteSource(node_modules)
    stream = PictureStream(source, config.seed)
    check = to_tensor(PictureStream(source, 999).batch(0, 256))

    def batch_of(step: int) -> tuple[torch.Tensor, ...]:
        pictures = to_tensor(stream.batch(step, config.batch))
        noise = torch.randn(config.batch, config.latent_channels, 16, 16)
        return pictures, noise, config.latent_noise * torch.rand(config.batch, 1, 1, 1)

    optimise(
        output,
        named,
        partial(autoencoder_loss, model, config, vision),
        batch_of,
        config,
        budget,
        lambda average: _write_result(output, model, average, check, config, budget),
        workers=workers,
        every=every,
        muon=config.muon,
        report_every=25,
    )


def _write_result(
    output: Path,
    model: AutoencoderKL,
    average: ExponentialAverage,
    check: torch.Tensor,
    config: AutoencoderConfig,
    budget: Budget,
) -> None:
    """Averaged weights, with whitened latents if those may change, and how good they are."""
    final = build_autoencoder(config)
    final.load_state_dict({**model.state_dict(), **average.shadow})
    if not config.decoder_only:
        whiten_latents(final, check)
    decibels, deviation, decoded = evaluate(final, check)
    final.register_to_config(scaling_factor=SCALING_FACTOR)
    final.save_pretrained(output / "vae")
    save_pairs(output / "pairs.png", check, decoded)
    record = {"config": asdict(config), "steps": budget.step, "seconds": round(budget.elapsed)}
    write_json_atomic(output / "autoencoder.json", {**record, "psnr": round(decibels, 2)})
    print(f"PSNR {decibels:.2f} dB, latent deviation {deviation:.3f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder filled by mini.fetch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--start-from", type=Path, help="folder of an autoencoder to go on from")
    parser.add_argument("--every", type=float, default=180, help="seconds between two states")
    parser.add_argument("--config", type=Path, help="JSON of an AutoencoderConfig")
    args = parser.parse_args()
    values = json.loads(args.config.read_text(encoding="utf-8")) if args.config else {}
    budget = Budget(args.minutes, args.steps)
    config = AutoencoderConfig.from_json(values)
    keep_freed_memory()
    modules, every = args.cache / "node_modules", args.every
    train(modules, args.output, config, budget, args.workers, args.start_from, every)


if __name__ == "__main__":
    main()
