"""``cntlora demo``: the main job on the embedded small model, and a sheet of what it did."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cntlora_core import mini
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    Method,
    OutputSettings,
    PriorSettings,
    SamplingSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter, silent

if TYPE_CHECKING:
    from PIL import Image

    from cntlora_core.metrics import Fidelity

SHEET_NAME = "before_and_after.png"
BASELINE = "plain_lora"
DEFAULT_SUBJECT = "backpack"
PICTURES_PER_PROMPT = 3
SCENES = ("on the beach", "in the forest", "in the desert", "in the snow", "in the city",
          "on a red background")  # fmt: skip
STEPS = TrainingSettings.steps
PROMPTS = 4
"""The first scenes that neither the photos show nor those that images are compared with."""
GUIDANCE = 2.5  # more is too much for the small model
_CALLED = {"base model": "before: no LoRA", "lora": "plain LoRA"}


@dataclass(frozen=True)
class Demo:
    """The main job on the embedded small model, in a few minutes on two CPU cores.

    Attributes:
        output: Folder for everything that the demo leaves.
        subject: Which of the embedded subjects: backpack, balloon, bird, boot, cat, clock, dragon,
            octopus, penguin or tent; default: the backpack.
        images: Folder of your own pictures instead, of something that the small model can draw.
        class_name: What they show, with images: "cat", "house", ....
        method: How the adapter is initialised; `cntlora methods` describes them. Plain LoRA is
            trained beside it.
        steps: Training steps.
    """

    output: UserPath = Path("demo_output")
    subject: str | None = None
    images: UserPath | None = None
    class_name: str | None = None
    method: Method = "cross"
    steps: int = STEPS

    def after_cancel(self) -> str:
        return "; the demo starts anew next time"

    def run(self, reporter: Reporter) -> None:
        if (self.images is None) != (self.class_name is None):
            raise ValueError("--images and --class-name belong together: give both, or neither")
        if self.images is not None and self.subject is not None:
            raise ValueError("--subject is one of the embedded ones: leave it out with --images")
        sheet = run_demo(
            self.output,
            subject_name=self.subject,
            images=self.images,
            class_name=self.class_name,
            method=self.method,
            steps=self.steps,
            reporter=reporter,
        )
        print(sheet)


def demo_settings(
    output: Path,
    photos: Path,
    class_name: str,
    *,
    cache: Path,
    method: Method = "cross",
    steps: int = STEPS,
    class_images: int = 32,
    class_steps: int = 12,
) -> JobSettings:
    """The defaults on the small model, with a method of one's own and few class images."""
    return JobSettings(
        model=str(mini.model_path()),
        subject=SubjectSettings(images=str(photos), token="sks", class_name=class_name),
        output=OutputSettings(output=str(output), keep_state=False),
        prior=PriorSettings(
            num_class_images=class_images,
            class_guidance=GUIDANCE,
            class_steps=class_steps,
            cache=str(cache),
        ),
        adapter=AdapterSettings(method=method),
        training=TrainingSettings(steps=steps, device="cpu"),
    )


def run_demo(
    output: Path,
    *,
    subject_name: str | None = None,
    images: Path | None = None,
    class_name: str | None = None,
    method: Method = "cross",
    steps: int = STEPS,
    class_images: int = 32,
    sampling_steps: int = 10,
    reporter: Reporter = silent,
) -> Path:
    """Personalise the small model with plain LoRA and with a method, and put it side by side.

    Args:
        output: Folder for LoRA, plots and record of the method; plain LoRA's are in a folder of it.
        subject_name: One of the embedded subjects.
        images: Folder of other pictures.
        class_name: Of what these show.
        method: An initialisation of the registry; for ``lora`` nothing is trained beside it.
        steps: Of each training.
        class_images: Generated ones, for prior preservation.
        sampling_steps: Of each generated picture on the sheet.
        reporter: Told of what is being done.

    Returns:
        The sheet: the photos and one scene, large; then for several prompts the base model, plain
        LoRA and the method, and how they score.

    Raises:
        ValueError: for a subject that is not embedded, or settings that make no sense.
    """
    from transformers.utils import logging

    from cntlora_core.data.photos import load_photos
    from cntlora_core.diffusion.job import personalise
    from cntlora_core.diffusion.sampler import LoRAUse, load_for_sampling
    from cntlora_core.figures.sheets import before_and_after, save_image
    from cntlora_core.metrics import load_encoders, measure, measure_photos, subject_features
    from cntlora_core.metrics.encoders import SMALL
    from cntlora_core.metrics.generation import GenerationSettings, generate_each

    logging.disable_progress_bar()  # all that is loaded is small, and here
    started = time.perf_counter()
    subject = mini.subject(subject_name or DEFAULT_SUBJECT)
    folder, called = images or subject.photos, class_name or subject.class_name
    known = load_photos(folder if images else subject.held_out, read_captions=False)
    jobs = {
        one: demo_settings(
            output if one == method else output / BASELINE,
            folder,
            called,
            cache=output / "cache",
            method=one,
            steps=steps,
            class_images=class_images,
        )
        for one in dict.fromkeys(("lora", method))
    }
    loras = {
        one: personalise(settings, overwrite=True, reporter=reporter).lora
        for one, settings in jobs.items()
    }

    sampling = SamplingSettings(
        steps=sampling_steps, guidance=GUIDANCE, scheduler="unipc", batch_size=12
    )
    photos = load_photos(folder).photos
    shown = " ".join(photo.caption or "" for photo in photos)
    shown += " ".join(() if images else subject.held_out_captions)
    scenes = [scene for scene in SCENES if scene not in shown][:PROMPTS]
    prompts = tuple(f"a sks {called} {scene}" for scene in scenes)
    drawn = GenerationSettings(prompts, PICTURES_PER_PROMPT, sampling=sampling)
    encoders = load_encoders(SMALL, SMALL)
    features = subject_features(encoders, [photo.image for photo in known.photos])
    pipeline = load_for_sampling(str(mini.model_path()), device="cpu", scheduler="unipc")
    labels, uses = [*map(_called, loras)], [*map(LoRAUse, loras.values())]
    columns, below, scores = [], [], {}
    for name, (label, pictures) in zip(
        ("base model", *loras), generate_each(pipeline, uses, drawn, reporter, labels), strict=True
    ):
        found = measure(encoders, features, pictures, drawn.all_prompts, token="sks", label=label)
        share = _right_backgrounds(pictures, drawn.all_prompts, called)
        scores[name] = {"dino": found.dino, "clip_i": found.clip_i, "clip_t": found.clip_t}
        scores[name]["backgrounds"] = share
        below.append(_in_words(found, share))
        columns.append(pictures)

    count = PICTURES_PER_PROMPT
    rows = [
        (prompt, [pictures[i * count : (i + 1) * count] for pictures in columns])
        for i, prompt in enumerate(prompts)
    ]
    trained = [f"{_called(name)}, {steps} steps" for name in loras]
    top = None if images else measure_photos(features)
    legend = f"DINO and CLIP-I: how near to {'the' if images else 'held-out'} photos"
    if top is not None:
        legend += f" (these among themselves: DINO {100 * top.dino:.0f})"
    sheet = before_and_after(
        [photo.image for photo in photos],
        rows,
        [f"photos of sks {called}", _called("base model"), *trained],
        [legend, *below],
    )
    save_image(sheet, output / SHEET_NAME)
    _complete_record(output, sampling, drawn.all_prompts, scores, time.perf_counter() - started)
    return output / SHEET_NAME


def _called(name: str) -> str:
    """What a column of the sheet is called."""
    from cntlora_core.methods import get_method

    if name in _CALLED:
        return _CALLED[name]
    return f"CNTLoRA ({name})" if get_method(name).family == "cntlora" else name


def _in_words(found: Fidelity, backgrounds: float | None) -> str:
    """``"DINO 88, CLIP-I 68"``, and the right backgrounds where they were counted."""
    words = f"DINO {100 * found.dino:.0f}, CLIP-I {100 * found.clip_i:.0f}"
    return words if backgrounds is None else f"{words}\nbackgrounds as asked: {backgrounds:.0%}"


def _right_backgrounds(
    pictures: Sequence[Image.Image], prompts: Sequence[str], class_name: str
) -> float | None:
    """The share of them; None where the package was installed without its research."""
    try:
        from cntlora_core.mini.making.evaluate import right_backgrounds
    except ModuleNotFoundError:
        return None
    return right_backgrounds(pictures, prompts, class_name)


def _complete_record(
    output: Path,
    sampling: SamplingSettings,
    prompts: list[str],
    scores: dict[str, Any],
    seconds: float,
) -> None:
    from cntlora_core.diffusion.job import RECORD_NAME
    from cntlora_core.runtime.files import write_json_atomic

    record: dict[str, Any] = json.loads((output / RECORD_NAME).read_text("utf-8"))
    record["demo"] = {
        "prompts": prompts,
        "sampling": sampling.__dict__,
        "sheet": SHEET_NAME,
        "scores": scores,
        "total_seconds": seconds,
    }
    write_json_atomic(output / RECORD_NAME, record)
