"""Makes the pictures of docs/if_it_looks_bad.md: trainings of the small model that go wrong.

    python docs/make_bad_runs.py [OUTPUT]

Five trainings, one of them a good one, and a sheet for each that went wrong, beside the good one.
On two CPU cores this takes ten minutes. OUTPUT keeps the trainings, which are then not repeated; by
default it is a temporary folder.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cntlora_core import mini
from cntlora_core.commands.demo import GUIDANCE, STEPS, demo_settings
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.run_identity import finished_run
from cntlora_core.diffusion.sampler import LoRAUse, load_for_sampling
from cntlora_core.diffusion.settings import SamplingSettings
from cntlora_core.figures.sheets import comparison_sheet, save_image
from cntlora_core.metrics.generation import GenerationSettings, generate_each

IMAGES = Path(__file__).parent / "images"
SUBJECT = mini.subject("penguin")
PROMPTS = ("a photo of sks penguin", "a sks penguin on the beach", "a sks penguin in the forest")
PER_PROMPT = 3
GOOD = f"1e-3, {STEPS} steps"
ONE_BACKGROUND = "3"  # the photo on a wooden floor

TROUBLES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "weak": ("1e-3, 20 steps", {"steps": 20}, False),
    "burnt": (
        "1e-2, 100 steps",
        {"learning_rate": 1e-2, "lr_schedule": "constant", "steps": 100},
        False,
    ),
    "background": (
        "2e-3, 100 steps, one background, no captions",
        {"learning_rate": 2e-3, "lr_schedule": "constant", "steps": 100},
        True,
    ),
    "forgotten": (
        "3e-3, 200 steps, no captions, no class images",
        {"learning_rate": 3e-3, "lr_schedule": "constant", "steps": 200},
        False,
    ),
}
"""By the name of its picture: a heading, what differs in the training, and whether all photos have
the same background."""


def train(output: Path, name: str, change: dict[str, Any], one_background: bool) -> Path:
    """Train the small model, and return the LoRA file."""
    if (found := finished_run(output / name)) is not None:
        return found.lora
    photos = SUBJECT.photos
    if name in ("forgotten", "background"):  # without captions
        photos = output / f"photos_{name}"
        photos.mkdir(parents=True, exist_ok=True)
        for path in SUBJECT.photos.glob("*.png"):
            if not one_background or path.stem == ONE_BACKGROUND:
                shutil.copy(path, photos)
    settings = demo_settings(output / name, photos, SUBJECT.class_name, cache=output / "cache")
    prior = settings.prior
    if name == "forgotten":
        prior = dataclasses.replace(prior, prior_weight=0.0)
    training = dataclasses.replace(settings.training, **change)
    settings = dataclasses.replace(settings, training=training, prior=prior)
    return personalise(settings, overwrite=True).lora


def make(output: Path) -> None:
    loras = {"good": train(output, "good", {}, False)}
    for name, (_, change, one_background) in TROUBLES.items():
        loras[name] = train(output, name, change, one_background)
    pipeline = load_for_sampling(str(mini.model_path()), device="cpu")
    asked = GenerationSettings(
        PROMPTS,
        PER_PROMPT,
        with_base=False,
        sampling=SamplingSettings(steps=20, guidance=GUIDANCE),
    )
    uses = [LoRAUse(path) for path in loras.values()]
    generated = generate_each(pipeline, uses, asked, labels=list(loras))
    pictures = {name: found for name, (_, found) in zip(loras, generated, strict=True)}
    for name, (heading, _, _) in TROUBLES.items():
        rows = [
            (prompt, [of_prompt(pictures[run], i) for run in (name, "good")])
            for i, prompt in enumerate(PROMPTS)
        ]
        sheet = comparison_sheet([], rows, [heading, f"mended: {GOOD}"], side=96)
        save_image(sheet, IMAGES / f"bad_{name}.jpg")


def of_prompt(pictures: Sequence[Any], place: int) -> list[Any]:
    return list(pictures[place * PER_PROMPT : (place + 1) * PER_PROMPT])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        make(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
