"""Train the classifier of images: ``python -m cntlora_core.mini.making.train_classifier``.

A small ResNet names the object and the background. It learns from composed pictures only and never
sees one that a model drew.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from cntlora_core.mini.making.collage import Collage, CollageConfig, every_background
from cntlora_core.mini.making.loop import Budget, ExponentialAverage, optimise
from cntlora_core.mini.making.object_classes import CORE_NAMES, OBJECT_CLASSES
from cntlora_core.mini.making.sprites import STYLES, SpriteSource
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.memory import keep_freed_memory

__all__ = ["ClassifierConfig", "build_classifier", "classifier_loss", "train"]


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape and training of the classifier; see :class:`~cntlora_core.mini.making.loop.Schedule`.

    Attributes:
        widths: channels per stage.
        batch: pictures a step.
        smoothing: of the labels.
    """

    widths: tuple[int, ...] = (32, 64, 128, 192)
    batch: int = 64
    smoothing: float = 0.05
    rate: float = 2e-3
    warmup_steps: int = 100
    decay_from: float = 0.3
    ema: float = 0.99
    seed: int = 3


def build_classifier(config: ClassifierConfig) -> ResNetForImageClassification:
    """Its first labels are ``CORE_NAMES``, the rest the phrases of all backgrounds."""
    labels = [*CORE_NAMES, *(background.phrase for background in every_background())]
    shape = ResNetConfig(
        embedding_size=config.widths[0],
        hidden_sizes=list(config.widths),
        depths=[1] * len(config.widths),
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    return ResNetForImageClassification(shape)


def classifier_loss(
    model: ResNetForImageClassification,
    smoothing: float,
    pictures: Tensor,
    objects: Tensor,
    backgrounds: Tensor,
) -> Tensor:
    """Cross-entropy of both answers.

    Args:
        model: the classifier.
        smoothing: of the labels.
        pictures: (n, 3, 64, 64) in -1..1.
        objects: (n,) indices into ``CORE_NAMES``.
        backgrounds: (n,) indices into the list of backgrounds.

    Returns:
        Scalar.
    """
    logits = model(pixel_values=pictures).logits
    count = len(CORE_NAMES)
    object_loss = functional.cross_entropy(logits[:, :count], objects, label_smoothing=smoothing)
    return object_loss + functional.cross_entropy(
        logits[:, count:], backgrounds, label_smoothing=smoothing
    )


def train(
    node_modules: Path, output: Path, config: ClassifierConfig, budget: Budget, workers: int = 2
) -> None:
    """Train until the budget is spent; ``output/classifier`` is the model.

    Args:
        node_modules: where the emoji are.
        output: folder of state, log and result.
        config: shape and training.
        budget: minutes or steps.
        workers: processes that share a batch.
    """
    output.mkdir(parents=True, exist_ok=True)
    source = SpriteSource(node_modules)
    named = {object_class.name: object_class for object_class in OBJECT_CLASSES}
    sprites, labels = [], []
    for style in STYLES:
        for index, name in enumerate(CORE_NAMES):
            for emoji in named[name].emoji:
                if source.is_shown(style, emoji):
                    sprites.append(source.sprite(style, emoji))
                    labels.append(index)
    label_of = torch.tensor(labels)
    backgrounds = every_background()
    collage = Collage(sprites, backgrounds, config.seed)
    torch.manual_seed(config.seed)
    model = build_classifier(config)

    def batch_of(_step: int, size: int = config.batch) -> tuple[Tensor, Tensor, Tensor]:
        # All names alike often, whatever the number of their drawings.
        names = torch.randint(len(CORE_NAMES), (size,))
        chosen = torch.stack([_any_of(label_of == name) for name in names])
        behind = torch.randint(len(backgrounds), (size,))
        return collage.compose(chosen, behind), names, behind

    check = Collage(sprites, backgrounds, config.seed + 1, CollageConfig(per_background=4))

    def note(average: ExponentialAverage) -> None:
        final = build_classifier(config)
        final.load_state_dict({**model.state_dict(), **average.shadow})
        torch.manual_seed(config.seed + 1)
        right = accuracy(final.eval(), check, label_of)
        final.save_pretrained(output / "classifier")
        record = {"config": asdict(config), "steps": budget.step, "seconds": round(budget.elapsed)}
        write_json_atomic(output / "classifier.json", {**record, **right})
        print(json.dumps(right), flush=True)

    optimise(
        output,
        dict(model.named_parameters()),
        partial(classifier_loss, model, config.smoothing),
        batch_of,
        config,
        budget,
        note,
        workers=workers,
    )


@torch.no_grad()
def accuracy(
    model: ResNetForImageClassification, collage: Collage, label_of: Tensor, count: int = 1024
) -> dict[str, float]:
    """Share of right answers on fresh pictures of real objects.

    Args:
        model: the classifier, in eval mode.
        collage: of the sprites that ``label_of`` names.
        label_of: (sprites,) indices into ``CORE_NAMES``.
        count: number of pictures.
    """
    chosen = torch.randint(len(label_of), (count,))
    behind = torch.randint(len(collage.backgrounds), (count,))
    pictures = collage.compose(chosen, behind)
    logits = torch.cat([model(pixel_values=part).logits for part in pictures.split(128)])
    names = len(CORE_NAMES)
    return {
        "things": (logits[:, :names].argmax(1) == label_of[chosen]).float().mean().item(),
        "backgrounds": (logits[:, names:].argmax(1) == behind).float().mean().item(),
    }


def _any_of(mask: Tensor) -> Tensor:
    at = mask.nonzero()[:, 0]
    return at[torch.randint(len(at), ())]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder filled by mini.fetch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    keep_freed_memory()
    budget = Budget(args.minutes, args.steps)
    train(args.cache / "node_modules", args.output, ClassifierConfig(), budget, args.workers)


if __name__ == "__main__":
    main()
