"""Make the subjects' pictures and ``subjects.json``.

``python -m cntlora_core.mini.making.make_subjects``

Each subject is one emoji of the 3D style, which no training has seen.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cntlora_core.mini.making.compose import Background, Placement, paste, render_background
from cntlora_core.mini.making.sprites import SpriteSource
from cntlora_core.runtime.files import write_json_atomic

__all__ = ["PROMPTS", "SUBJECTS", "make"]


@dataclass(frozen=True)
class SubjectSource:
    """Where one subject comes from.

    Attributes:
        name: folder name.
        class_name: noun that the small model knows.
        kind: ``"live"`` or ``"object"``.
        emoji: short name of the emoji, drawn in the 3D style.
    """

    name: str
    class_name: str
    kind: str
    emoji: str


SUBJECTS = (
    SubjectSource("cat", "cat", "live", "black_cat"),
    SubjectSource("bird", "bird", "live", "bird"),
    SubjectSource("penguin", "penguin", "live", "penguin"),
    SubjectSource("octopus", "octopus", "live", "octopus"),
    SubjectSource("dragon", "dragon", "live", "dragon_face"),
    SubjectSource("backpack", "backpack", "object", "school_satchel"),
    SubjectSource("boot", "boot", "object", "boot"),
    SubjectSource("clock", "clock", "object", "alarm_clock"),
    SubjectSource("balloon", "balloon", "object", "balloon"),
    SubjectSource("tent", "tent", "object", "tent"),
)
TOKEN = "sks"
SIDE = 128

# Ten surroundings a subject, five to train on and five to measure with.
_SURROUNDINGS = (
    Background("scene", "on the grass"),
    Background("plain", "white"),
    Background("checks", "blue"),
    Background("scene", "on a wooden floor"),
    Background("gradient", "orange"),
    Background("scene", "on the beach"),
    Background("plain", "yellow"),
    Background("stripes", "green"),
    Background("scene", "in front of a brick wall"),
    Background("plain", "gray"),
)

_COMMON = (
    "a {} in the snow",
    "a {} on the beach",
    "a {} in the forest",
    "a {} on the grass",
    "a {} in the water",
    "a {} in the sky",
    "a {} in the desert",
    "a {} in space",
    "a {} in the city",
    "a {} in the mountains",
    "a {} in front of a brick wall",
    "a {} on a wooden floor",
    "a {} on a red background",
    "a {} on a blue background",
    "a {} on a black background",
    "a {} on green stripes",
    "a {} on purple dots",
    "a {} on pink checks",
    "a {} and an apple on a white background",
    "a {} with a balloon on a yellow background",
    "a purple {} on a white background",
    "a green {} on a gray background",
)
PROMPTS: dict[str, tuple[str, ...]] = {
    "live": (
        *_COMMON,
        "a {} wearing a hat on a green background",
        "a {} wearing a crown on a blue background",
        "a {} wearing a hat in the snow",
    ),
    "object": (
        *_COMMON,
        "a {} and a cat on a blue background",
        "a {} with a tree on the grass",
        "a {} and a dog in the city",
    ),
}


def make(node_modules: Path, output: Path, seed: int) -> None:
    """Draw all subjects and write ``subjects.json``.

    Args:
        node_modules: where the emoji are.
        output: folder of the subjects; theirs are replaced.
        seed: of placements and backgrounds.
    """
    source = SpriteSource(node_modules)
    table: dict[str, dict] = {}
    for number, subject in enumerate(SUBJECTS):
        rng = np.random.default_rng((seed, number))
        sprite = source.sprite("3d", subject.emoji)
        order = rng.permutation(len(_SURROUNDINGS))
        folder = output / subject.name
        shutil.rmtree(folder, ignore_errors=True)
        row: dict = {
            "class_name": subject.class_name,
            "kind": subject.kind,
            "token": TOKEN,
            "emoji": subject.emoji,
            "photos": [],
            "held_out": [],
        }
        for index, which in enumerate(order):
            part = "photos" if index < 5 else "held_out"
            background = _SURROUNDINGS[which]
            picture = compose(sprite, background, rng)
            path = folder / part / f"{index % 5}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, optimize=True)
            if part == "photos":  # the surroundings are named, so that they are not learnt with it
                caption = f"a photo of {{token}} {{class}} {background.phrase}\n"
                path.with_suffix(".txt").write_text(caption, encoding="utf-8")
            row[part].append(f"a photo of a {TOKEN} {subject.class_name} {background.phrase}")
        table[subject.name] = row
    value = {
        "style": "@lobehub/fluent-emoji-3d",
        "seed": seed,
        "subjects": table,
        "prompts": {kind: list(prompts) for kind, prompts in PROMPTS.items()},
    }
    write_json_atomic(output / "subjects.json", value)


def compose(sprite: Image.Image, background: Background, rng: np.random.Generator) -> Image.Image:
    """One picture of a subject, RGB, ``SIDE`` pixels square."""
    image = render_background(background, rng, SIDE)
    extent = rng.uniform(0.55, 0.85)
    slack = (1 - extent) / 2
    centre = (0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack))
    flip = bool(rng.random() < 0.5)
    paste(image, sprite, Placement(extent, centre, rng.uniform(-20, 20), flip))
    return Image.fromarray(np.clip(image.round(), 0, 255).astype(np.uint8))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder filled by mini.fetch")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "subjects")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    make(args.cache / "node_modules", args.output, args.seed)
    print(f"{len(SUBJECTS)} subjects in {args.output}")


if __name__ == "__main__":
    main()
