"""Classify what the model generates: ``python -m cntlora_core.mini.making.evaluate``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from cntlora_core.diffusion.sampler import generate, load_for_sampling
from cntlora_core.diffusion.settings import SamplingSettings
from cntlora_core.metrics.pictures import read_pictures
from cntlora_core.mini import model_path
from cntlora_core.mini.making.backgrounds import COLOURS, PATTERNS, SCENES
from cntlora_core.mini.making.compose import Background
from cntlora_core.mini.making.dataset import save_sheet
from cntlora_core.mini.making.object_classes import MODEL_CLASSES, with_article
from cntlora_core.runtime.console import ConsoleReporter
from cntlora_core.runtime.files import write_json_atomic

__all__ = [
    "CLASSIFIED_NAMES",
    "as_batch",
    "classify",
    "classify_folder",
    "load_classifier",
    "on_plain",
    "prompts_to_classify",
    "right_backgrounds",
]

CLASSIFIER = Path(__file__).parents[1] / "encoders" / "judge"

CLASSIFIED_NAMES = tuple(object_class.name for object_class in MODEL_CLASSES)
"""The objects that the classifier chooses among: all that the model draws."""
SIMPLE = (*(Background("plain", colour).phrase for colour in COLOURS), *SCENES)
"""Plain backgrounds and scenes: those it chooses among, unless the prompt has a pattern."""
PATTERNED = tuple(Background(kind, colour).phrase for kind in PATTERNS for colour in COLOURS)


def prompts_to_classify(count: int, seed: int) -> list[tuple[str, str, str]]:
    """``(prompt, object, background)``: every object alike often; plain, scene, pattern in turn."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        turn, place = divmod(index, len(CLASSIFIED_NAMES))
        name, kind = (
            CLASSIFIED_NAMES[place],
            ("plain", "scene", str(rng.choice(list(PATTERNS))))[turn % 3],
        )
        values = list(SCENES if kind == "scene" else COLOURS)
        background = Background(kind, str(rng.choice(values)))
        prompt = f"a photo of {with_article(name)} {background.phrase}"
        rows.append((prompt, name, background.phrase))
    return rows


@torch.no_grad()
def classify(
    classifier: ResNetForImageClassification, pictures: Tensor, rows: list[tuple[str, str, str]]
) -> tuple[Tensor, Tensor]:
    """Which pictures show the right object, and which the right background.

    The object is chosen among ``CLASSIFIED_NAMES``, the background among the plain ones and scenes;
    where the prompt has a pattern, among the patterns too.

    Args:
        classifier: made by ``mini.train_classifier``.
        pictures: (n, 3, 64, 64) in -1..1.
        rows: of :func:`prompts_to_classify`.

    Returns:
        Two bool tensors (n,).
    """
    names = _labels(classifier, CLASSIFIED_NAMES)
    phrases = _labels(classifier, (*SIMPLE, *PATTERNED))
    logits = torch.cat([classifier(pixel_values=part).logits for part in pictures.split(100)])
    found = names[logits[:, names].argmax(1)]
    scores = logits[:, phrases]
    simple = torch.tensor([phrase in SIMPLE for _, _, phrase in rows])
    scores[simple, len(SIMPLE) :] = -torch.inf
    behind = phrases[scores.argmax(1)]
    wanted = [_labels(classifier, [row[i] for row in rows]) for i in (1, 2)]
    return found == wanted[0], behind == wanted[1]


@torch.no_grad()
def on_plain(classifier: ResNetForImageClassification, pictures: Tensor) -> Tensor:
    """Which of (n, 3, 64, 64) pictures lie on a plain background, of all that there are: (n,)."""
    phrases = _labels(classifier, (*SIMPLE, *PATTERNED))
    return classifier(pixel_values=pictures).logits[:, phrases].argmax(1) < len(COLOURS)


def _labels(classifier: ResNetForImageClassification, names: Sequence[str]) -> Tensor:
    """The classifier's numbers of these names, (n,)."""
    numbers = classifier.config.label2id or {}
    return torch.tensor([int(numbers[name]) for name in names])


def as_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as the classifier takes them: (n, 3, height, width) in -1..1."""
    stack = np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in pictures])
    return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1


def load_classifier(folder: Path | None = None) -> ResNetForImageClassification:
    """The classifier, in eval mode; the shipped one, or the output of ``mini.train_classifier``."""
    classifier = ResNetForImageClassification.from_pretrained(
        folder or CLASSIFIER, dtype=torch.float32
    )
    assert isinstance(classifier, ResNetForImageClassification)
    return classifier.eval()


def rows_of_prompts(prompts: Sequence[str], object_name: str) -> list[tuple[str, str, str] | None]:
    """What the classifier is to find in pictures that were generated for prompts.

    Args:
        prompts: One for each picture.
        object_name: What they all show, one of ``CLASSIFIED_NAMES``.

    Returns:
        For each ``(prompt, object, background)``; None for a prompt that does not end in the name
        of the object and a background alone.
    """
    rows: list[tuple[str, str, str] | None] = []
    for prompt in prompts:
        behind = prompt.rpartition(f"{object_name} ")[2]
        fits = (
            behind in (*SIMPLE, *PATTERNED) and " wearing " not in prompt and " and " not in prompt
        )
        rows.append((prompt, object_name, behind) if fits else None)
    return rows


def right_backgrounds(
    images: Sequence[Image.Image], prompts: Sequence[str], class_name: str
) -> float | None:
    """Share of the images whose background the classifier takes for the one of the prompt.

    Args:
        images: Generated images.
        prompts: The prompt of each.
        class_name: What they all show, as the prompts have it.

    Only prompts that end in a background count; None where none does.
    """
    chosen = [
        # The name is that of any object which the classifier knows: backgrounds alone are asked.
        (image, (prompt, CLASSIFIED_NAMES[0], row[2]))
        for image, prompt, row in zip(
            images, prompts, rows_of_prompts(prompts, class_name), strict=True
        )
        if row is not None
    ]
    if not chosen:
        return None
    pictures, rows = zip(*chosen, strict=True)
    return float(classify(_classifier(), as_batch(pictures), list(rows))[1].float().mean())


@functools.lru_cache(maxsize=1)
def _classifier() -> ResNetForImageClassification:
    return load_classifier()


def classify_folder(
    classifier: ResNetForImageClassification, folder: Path, object_name: str
) -> dict[str, float]:
    """Shares of a folder's pictures with the right object and background, by its prompts.json.

    Raises:
        ValueError: an object that the classifier does not know, or no prompt that it can classify.
    """
    if object_name not in CLASSIFIED_NAMES:
        raise ValueError(
            f"the classifier knows no {object_name!r}; it knows {', '.join(CLASSIFIED_NAMES)}"
        )
    found = read_pictures(folder)
    chosen = [
        (picture, row)
        for picture, row in zip(
            found.pictures, rows_of_prompts(found.prompts or (), object_name), strict=False
        )
        if row is not None
    ]
    if not chosen:
        raise ValueError(f"no prompt in {folder} names a background alone")
    pictures, rows = zip(*chosen, strict=True)
    objects, backgrounds = classify(classifier, as_batch(pictures), list(rows))
    shares = {"things": objects, "backgrounds": backgrounds}
    return {"pictures": len(rows)} | {
        k: round(v.float().mean().item(), 4) for k, v in shares.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the model; the shipped one if left")
    parser.add_argument(
        "--classifier", type=Path, help="folder of the classifier; the shipped one if left"
    )
    parser.add_argument("--output", type=Path, help="folder of figures and sheet")
    parser.add_argument("--pictures", type=Path, nargs="+", help="classify these folders instead")
    parser.add_argument("--thing", dest="object_name", help="what the pictures of the folders show")
    parser.add_argument("--count", type=int, default=8 * len(CLASSIFIED_NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    args = parser.parse_args()
    if args.pictures:
        if not args.object_name:
            parser.error("--pictures needs --thing")
        for folder in args.pictures:
            print(
                folder.name,
                classify_folder(load_classifier(args.classifier), folder, args.object_name),
            )
        return
    if args.output is None:
        parser.error("give --output, or --pictures and --thing")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = prompts_to_classify(args.count, args.seed)
    settings = SamplingSettings(
        steps=args.steps, guidance=args.guidance, seed=args.seed, batch_size=20
    )
    pipeline = load_for_sampling(str(args.model or model_path()), (), device="cpu")
    with ConsoleReporter().running() as reporter:
        generated = generate(
            pipeline, [prompt for prompt, _, _ in rows], settings, reporter=reporter
        )
        bare = generate(
            pipeline,
            [f"a photo of {with_article(name)}" for name in CLASSIFIED_NAMES],
            settings,
            reporter=reporter,
        )
    classifier = load_classifier(args.classifier)
    objects, backgrounds = classify(classifier, as_batch(generated), rows)
    figures = {
        "pictures": len(rows),
        "things": round(objects.float().mean().item(), 4),
        "backgrounds": round(backgrounds.float().mean().item(), 4),
        "plain_where_none_is_named": round(
            on_plain(classifier, as_batch(bare)).float().mean().item(), 4
        ),
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "right_by_thing": {
            name: f"{int(sum(objects[i] for i in at))} of {len(at)}"
            for name in CLASSIFIED_NAMES
            for at in [[i for i, row in enumerate(rows) if row[1] == name]]
        },
    }
    write_json_atomic(args.output / "judged.json", figures)
    first = [
        Image.fromarray(np.asarray(picture)) for picture in generated[: 3 * len(CLASSIFIED_NAMES)]
    ]
    save_sheet(args.output / "judged.png", first, len(CLASSIFIED_NAMES) // 2)
    print(f"right objects {figures['things']:.1%}, right backgrounds {figures['backgrounds']:.1%}")


if __name__ == "__main__":
    main()
