"""The LoRAs of one run side by side: the same prompts and seeds, scores, and the best trade-off.

More steps show the subject better and follow other words of a prompt less. Both are measured on a
scale of their own, from 0 to 1, whose ends no LoRA decides:

- subject: 0 is the DINO score of the model without a LoRA, 1 that of the photos among themselves
  (of a single photo, the cosine 1);
- prompt: 1 is the CLIP-T score of the model without a LoRA, 0 that of the photos themselves under
  the same prompts, which is what is left where a LoRA generates nothing but its photos.

The balance of a step is the harmonic mean of the two, and the best step is that of the largest
balance, of equals the earliest. Where the two ends of a scale are in the wrong order it says
nothing, and counts as 1 for every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.table import Table

from cntlora_core.diffusion.compare import LARGEST_SIDE
from cntlora_core.diffusion.sampler import LoRAUse
from cntlora_core.metrics.encoders import Encoders
from cntlora_core.metrics.fidelity import (
    Fidelity,
    measure,
    measure_photos,
    measure_photos_under,
    subject_features,
)
from cntlora_core.metrics.generation import GenerationSettings, generate_each
from cntlora_core.metrics.view import fidelity_table, fidelity_text, pictures_sheet
from cntlora_core.runtime.progress import Reporter, silent

if TYPE_CHECKING:
    from cntlora_core.diffusion.pipeline import Pipeline

NO_STEP = "no step shows the subject better than the model without a LoRA"


@dataclass(frozen=True)
class Ends:
    """The ends of both scales that no LoRA decides; cosines.

    Attributes:
        base_dino: DINO of the model without a LoRA: subject 0.
        photos_dino: DINO of the photos among themselves: subject 1.
        base_clip_t: CLIP-T of the model without a LoRA: prompt 1.
        photos_clip_t: CLIP-T of the photos under the same prompts: prompt 0.
    """

    base_dino: float
    photos_dino: float
    base_clip_t: float
    photos_clip_t: float

    def balance(self, dino: float, clip_t: float) -> float:
        """The harmonic mean of where two scores lie on their scales, in [0, 1]."""
        subject = _share(dino, self.base_dino, self.photos_dino)
        prompt = _share(clip_t, self.photos_clip_t, self.base_clip_t)
        return 2 * subject * prompt / (subject + prompt) if subject + prompt else 0.0


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 1.0


@dataclass(frozen=True, eq=False)
class StepComparison:
    """The LoRAs of a run, compared.

    Attributes:
        steps: Of each LoRA.
        sheet: Photos above; a row for each prompt, a column for the model without a LoRA and one
            for each step.
        results: The scores of each column; empty where none were asked for.
        balances: Of each step, in [0, 1]; likewise.
        ends: What balances are measured between; None likewise.
        notes: What a person should know.
    """

    steps: tuple[int, ...]
    sheet: Image.Image
    results: tuple[Fidelity, ...] = ()
    balances: tuple[float, ...] = ()
    ends: Ends | None = None
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> int | None:
        """The step of the largest balance; None without scores, or where every balance is 0."""
        if not any(self.balances):
            return None
        return self.steps[self.balances.index(max(self.balances))]

    def verdict(self) -> str:
        """The best trade-off in a sentence; empty without scores."""
        if not self.results:
            return ""
        if self.best is None:
            return f"there is no best step: {NO_STEP}"
        return f"best trade-off of subject and prompt: step {self.best}"

    def table(self) -> Table:
        """One row for each column of the sheet."""
        return fidelity_table(self.results, [None, *self.balances])

    def report(self) -> str:
        """A line for each column, notes, and the verdict, as text."""
        balances = ["", *(f", balance {100 * balance:.1f}" for balance in self.balances)]
        lines = [
            f"{result.label}: {fidelity_text(result)}{balance}"
            for result, balance in zip(self.results, balances)
        ]
        return "\n".join([*lines, *self.notes, *filter(None, [self.verdict()])])

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the sheet."""
        rows = zip((None, *self.steps), self.results, (None, *self.balances))
        return {
            "steps": list(self.steps),
            "best": self.best,
            "ends": None if self.ends is None else dataclasses.asdict(self.ends),
            "results": [
                {"step": step, "balance": balance, **result.to_dict()}
                for step, result, balance in rows
            ],
            "notes": list(self.notes),
        }


def compare_steps(
    pipeline: Pipeline,
    loras: Sequence[tuple[int, LoRAUse]],
    settings: GenerationSettings,
    *,
    photos: Sequence[Image.Image] = (),
    encoders: Encoders | None = None,
    token: str | None = None,
    reporter: Reporter = silent,
) -> StepComparison:
    """Generate with the LoRA of each step and without one, and score what comes out.

    Args:
        pipeline: Without adapters; each LoRA is loaded into it and taken out again.
        loras: Steps and LoRAs, by step.
        settings: Prompts, how many images of each, seeds and sampling.
        photos: Of the subject.
        encoders: What measures; None, or no photos, for the sheet alone.
        token: The word that stands for the subject, which CLIP is not asked for.
        reporter: Told of the images generated and measured.
    """
    settings = dataclasses.replace(settings, with_base=True)
    labels = [f"step {step}" for step, _ in loras]
    uses, prompts = [use for _, use in loras], settings.all_prompts
    pictures = dict(generate_each(pipeline, uses, settings, reporter, labels))
    side = max(96, min(LARGEST_SIDE, next(iter(pictures.values()))[0].width))
    shown = [(images, prompts) for images in pictures.values()]
    steps = tuple(step for step, _ in loras)
    if encoders is None or not photos:
        return StepComparison(steps, pictures_sheet(photos, list(pictures), shown, side=side))

    features = subject_features(encoders, photos, reporter)
    results = tuple(
        measure(encoders, features, images, prompts, token=token, label=label, reporter=reporter)
        for label, images in pictures.items()
    )
    base, among = results[0], measure_photos(features)
    ends = Ends(
        base.dino,
        1.0 if among is None else among.dino,
        base.clip_t or 0.0,
        measure_photos_under(encoders, features, settings.prompts, token),
    )
    balances = tuple(ends.balance(result.dino, result.clip_t or 0.0) for result in results[1:])
    columns = [f"{result.label}: {fidelity_text(result)}" for result in results]
    found = StepComparison(
        steps,
        pictures_sheet(photos, columns, shown, side=side),
        results,
        balances,
        ends,
        notes=tuple(dict.fromkeys(note for result in results for note in result.notes)),
    )
    if found.best is not None:
        columns[1 + steps.index(found.best)] += " (best trade-off)"
    return dataclasses.replace(found, sheet=pictures_sheet(photos, columns, shown, side=side))
