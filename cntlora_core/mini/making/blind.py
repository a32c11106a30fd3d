"""A naming test for someone who has not seen the prompts.

``python -m cntlora_core.mini.making.blind``

Twenty prompts, two generated images each, none picked, numbered in random order on ``images.png``;
``names.txt`` has the 40 names to choose from. With ``--answers FILE`` (a line an image: its number
and a name) the answers are compared with ``key.json``, which the person must not see.

``--subjects penguin backpack`` draws the prompts of these subjects instead, an image each and
without a LoRA, for someone who counts which of ``prompts.txt`` are obeyed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cntlora_core.mini import model_path, subject, subjects
from cntlora_core.mini.making.backgrounds import COLOURS, PATTERNS, SCENES
from cntlora_core.mini.making.compose import Background
from cntlora_core.mini.making.object_classes import MODEL_CLASSES, trained_classes, with_article
from cntlora_core.runtime.files import write_json_atomic

__all__ = [
    "blind_prompts",
    "count_right",
    "lay_out",
    "names_to_choose_from",
    "protocol_prompts",
    "read_answers",
]


def blind_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts of different objects, as ``(prompt, name)``; scenes, colours and patterns in turn."""
    rng = np.random.default_rng(seed)
    names = [object_class.name for object_class in MODEL_CLASSES]
    chosen = [names[i] for i in rng.permutation(len(names))[:count]]
    rows = []
    for index, name in enumerate(chosen):
        colour = str(rng.choice(list(COLOURS)))
        behind = (
            Background("scene", str(rng.choice(list(SCENES)))),
            Background("plain", colour),
            Background(str(rng.choice(list(PATTERNS))), colour),
        )[index % 3]
        rows.append((f"a photo of {with_article(name)} {behind.phrase}", name))
    return rows


def names_to_choose_from(count: int, seed: int) -> list[str]:
    """The names of all objects of the model, and others that it does not know, sorted."""
    known = [object_class.name for object_class in MODEL_CLASSES]
    others = [
        object_class.name for object_class in trained_classes() if object_class.name not in known
    ]
    order = np.random.default_rng((seed, 1)).permutation(len(others))
    return sorted([*known, *(others[i] for i in order[: count - len(known)])])


def protocol_prompts(names: Sequence[str]) -> list[str]:
    """The prompts of these subjects, with the class in the place of the subject."""
    chosen = [subject(name) for name in names]
    return [f"a photo of {prompt.format(s.class_name)}" for s in chosen for prompt in s.prompts]


def lay_out(images: Sequence[Image.Image], path: Path, columns: int = 8, scale: int = 2) -> None:
    """A sheet of numbered images, from 1."""
    side = images[0].width * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 18)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = index % columns * (side + 4), index // columns * (side + 18)
        sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        pen.text((left + 2, top + side), str(index + 1), "black", font_size=13)
    sheet.save(path)


def read_answers(text: str) -> dict[int, str]:
    """``"1 dog"`` or ``"1: dog"``, a line an image.

    Raises:
        ValueError: if a line does not begin with a number, or a number comes twice.
    """
    answers: dict[int, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        found = re.fullmatch(r"(\d+)\s*[.:]?\s+(.+)", line)
        if found is None or int(found[1]) in answers:
            raise ValueError(f"{line!r} is not a new number and a name, such as '1 dog'")
        answers[int(found[1])] = found[2].strip().lower()
    return answers


def count_right(answers: Mapping[int, str], key: Sequence[Mapping[str, str]]) -> dict[str, object]:
    """How many images, and how many prompts with both images, were named rightly.

    Args:
        answers: number of the image, from 1 -> name; a missing one is wrong.
        key: ``prompt`` and ``name`` of each image in the sheet's order.
    """
    right = [answers.get(number) == row["name"] for number, row in enumerate(key, 1)]
    by_prompt: dict[str, list[bool]] = {}
    for row, good in zip(key, right, strict=True):
        by_prompt.setdefault(row["prompt"], []).append(good)
    return {
        "images": len(key),
        "images_right": sum(right),
        "prompts": len(by_prompt),
        "prompts_with_every_image_right": sum(all(good) for good in by_prompt.values()),
        "mistaken": [
            {"prompt": row["prompt"], "answer": answers.get(number, "")}
            for number, (row, good) in enumerate(zip(key, right, strict=True), 1)
            if not good
        ],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the model; default: the shipped one")
    parser.add_argument("--output", type=Path, required=True, help="folder of the test")
    parser.add_argument("--answers", type=Path, help="compare these answers with the folder's key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--subjects", nargs="+", choices=subjects(), help="draw their prompts")
    args = parser.parse_args()
    key_file = args.output / "key.json"
    if args.answers:
        key = json.loads(key_file.read_text(encoding="utf-8"))
        counted = count_right(read_answers(args.answers.read_text(encoding="utf-8")), key)
        print(json.dumps(counted, indent=2))
        return
    from cntlora_core.diffusion.sampler import generate, load_for_sampling
    from cntlora_core.diffusion.settings import SamplingSettings

    args.output.mkdir(parents=True, exist_ok=True)
    rows = [row for row in blind_prompts(20, args.seed) for _ in range(2)]
    rows = [rows[i] for i in np.random.default_rng((args.seed, 2)).permutation(len(rows))]
    prompts = [prompt for prompt, _ in rows]
    if args.subjects:
        if key_file.exists():
            parser.error(f"{args.output} holds a naming test, whose images would be lost")
        prompts = protocol_prompts(args.subjects)
    pipeline = load_for_sampling(str(args.model or model_path()), (), device="cpu")
    settings = SamplingSettings(
        steps=args.steps, guidance=args.guidance, seed=args.seed, batch_size=20
    )
    lay_out(generate(pipeline, prompts, settings), args.output / "images.png")
    if args.subjects:
        lines = [f"{number} {prompt}\n" for number, prompt in enumerate(prompts, 1)]
        (args.output / "prompts.txt").write_text("".join(lines), encoding="utf-8")
        print(f"wrote {args.output / 'images.png'} and prompts.txt")
        return
    names = "\n".join(names_to_choose_from(40, args.seed))
    (args.output / "names.txt").write_text(names + "\n", encoding="utf-8")
    write_json_atomic(key_file, [{"prompt": prompt, "name": name} for prompt, name in rows])
    print(f"wrote {args.output / 'images.png'}, names.txt and key.json")


if __name__ == "__main__":
    main()
