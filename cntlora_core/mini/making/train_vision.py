"""Train the small self-supervised image encoder.

``python -m cntlora_core.mini.making.train_vision``

Two pictures of one drawing, on other backgrounds, at another size, place and angle, are to lie near
each other and far from those of other drawings (contrastive, arXiv 2002.05709). No names are used.
It takes the part that DINO has in DreamBooth's protocol: how alike are two pictures' subjects?
"""

# transformers' forward methods are wrapped in untyped decorators:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import Linear, functional
from transformers import ViTConfig, ViTModel

try:
    from transformers import ViTImageProcessorPil
except ImportError:  # transformers 4
    from transformers import ViTImageProcessor as ViTImageProcessorPil

from cntlora_core.mini.making.collage import Collage, CollageConfig, every_background
from cntlora_core.mini.making.loop import Budget, ExponentialAverage, optimise
from cntlora_core.mini.making.sprites import TRAINED_STYLES, SpriteSource
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.memory import keep_freed_memory

__all__ = ["VisionConfig", "build_encoder", "contrast_loss", "same_subject", "train"]


@dataclass(frozen=True)
class VisionConfig:
    """Shape and training of the encoder; see :class:`~cntlora_core.mini.making.loop.Schedule`.

    Attributes:
        width: of the tokens.
        layers: of the transformer.
        heads: attention heads.
        patch: side of a patch in pixels.
        head: width of the space in which pictures are compared while training.
        temperature: of the contrast.
        batch: pairs of pictures a step.
    """

    width: int = 160
    layers: int = 5
    heads: int = 5
    patch: int = 8
    head: int = 96
    temperature: float = 0.1
    batch: int = 96
    rate: float = 1e-3
    warmup_steps: int = 150
    decay_from: float = 0.3
    ema: float = 0.99
    seed: int = 5


def build_encoder(config: VisionConfig) -> ViTModel:
    """A ViTModel for 64-pixel pictures; its first token stands for the picture."""
    shape = ViTConfig(
        image_size=64,
        patch_size=config.patch,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
    )
    return ViTModel(shape, add_pooling_layer=False)


def build_head(config: VisionConfig) -> nn.Module:
    """Used while training only."""
    width = config.width
    return nn.Sequential(Linear(width, 2 * width), nn.GELU(), Linear(2 * width, config.head))


def contrast_loss(
    model: ViTModel, head: nn.Module, temperature: float, first: Tensor, second: Tensor
) -> Tensor:
    """NT-Xent loss of two views of every drawing.

    Args:
        model: the encoder.
        head: (n, width) -> (n, head).
        temperature: of the softmax.
        first: (n, 3, 64, 64) in -1..1.
        second: the same drawings, drawn otherwise.

    Returns:
        Scalar.
    """
    views = torch.cat([first, second])
    states = model(pixel_values=views).last_hidden_state[:, 0]
    rows = functional.normalize(head(states), dim=-1)
    alike = rows @ rows.T / temperature
    alike = alike.masked_fill(torch.eye(len(rows), dtype=torch.bool), float("-inf"))
    partner = torch.arange(len(rows)).roll(len(first))
    return functional.cross_entropy(alike, partner)


@torch.no_grad()
def same_subject(
    model: ViTModel, collage: Collage, subjects: int = 50, views: int = 5, rounds: int = 10
) -> float:
    """Share of pictures whose nearest picture, by the cosine, shows the same drawing.

    Each of ``subjects`` drawings is shown ``views`` times; no two views have one background.

    Args:
        model: the encoder, in eval mode.
        collage: of the drawings to choose from.
        subjects: drawings to tell apart.
        views: pictures of each.
        rounds: how often drawings are chosen anew.
    """
    right = []
    for _ in range(rounds):
        chosen = torch.randperm(len(collage.sprites))[:subjects].repeat_interleave(views)
        behind = torch.cat(
            [torch.randperm(len(collage.backgrounds))[:views] for _ in range(subjects)]
        )
        pictures = collage.compose(chosen, behind)
        rows = torch.cat(
            [model(pixel_values=part).last_hidden_state[:, 0] for part in pictures.split(125)]
        )
        rows = functional.normalize(rows, dim=-1)
        alike = (rows @ rows.T).fill_diagonal_(-2)
        right.append((chosen[alike.argmax(1)] == chosen).float().mean())
    return torch.stack(right).mean().item()


def split_drawings(source: SpriteSource) -> tuple[list[Image.Image], list[Image.Image]]:
    """Drawings of both trained styles, without skin tones: eleven in twelve, and the others.

    An emoji is among the same ones in every style.
    """
    shown, held_out = [], []
    for style in TRAINED_STYLES:
        for code, sprite in source.all_of(style, skin_tones=False).items():
            (held_out if zlib.crc32(code.encode()) % 12 == 0 else shown).append(sprite)
    return shown, held_out


def train(
    node_modules: Path, output: Path, config: VisionConfig, budget: Budget, workers: int = 2
) -> None:
    """Train until the budget is spent; ``output/vision`` is the encoder with its processor.

    Args:
        node_modules: where the emoji are.
        output: folder of state, log and result.
        config: shape and training.
        budget: minutes or steps.
        workers: processes that share a batch.
    """
    output.mkdir(parents=True, exist_ok=True)
    source = SpriteSource(node_modules)
    backgrounds = every_background()
    shown, held_out = split_drawings(source)
    collage = Collage(shown, backgrounds, config.seed)
    few, unseen = CollageConfig(per_background=2), source.all_of("3d", skin_tones=False)
    checks = {
        "held_out": Collage(held_out, backgrounds, config.seed + 1, few),
        "unseen_style": Collage(list(unseen.values()), backgrounds, config.seed + 2, few),
    }
    torch.manual_seed(config.seed)
    model, head = build_encoder(config), build_head(config)

    def batch_of(_step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(collage.sprites))[: config.batch]
        behind = torch.randint(len(backgrounds), (2, config.batch))
        return collage.compose(chosen, behind[0]), collage.compose(chosen, behind[1])

    def note(average: ExponentialAverage) -> None:
        final = build_encoder(config)
        kept = {n.removeprefix("model."): t for n, t in average.shadow.items() if n[:5] == "model"}
        final.load_state_dict({**model.state_dict(), **kept})
        final.eval()
        torch.manual_seed(config.seed + 1)
        found = {name: round(same_subject(final, check), 4) for name, check in checks.items()}
        final.half().save_pretrained(output / "vision")
        processor = ViTImageProcessorPil(
            size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        processor.save_pretrained(output / "vision")
        record = {"config": asdict(config), "steps": budget.step, "seconds": round(budget.elapsed)}
        write_json_atomic(output / "vision.json", {**record, **found})
        print(json.dumps(found), flush=True)

    named = {f"model.{name}": p for name, p in model.named_parameters()}
    named.update({f"head.{name}": p for name, p in head.named_parameters()})
    optimise(
        output,
        named,
        partial(contrast_loss, model, head, config.temperature),
        batch_of,
        config,
        budget,
        note,
        workers=workers,
        report_every=25,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder filled by mini.fetch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    keep_freed_memory()
    budget = Budget(args.minutes, args.steps)
    train(args.cache / "node_modules", args.output, VisionConfig(), budget, args.workers)


if __name__ == "__main__":
    main()
