"""LoRAs side by side: one labelled grid over LoRAs, prompts, strengths and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

from cntlora_core.diffusion.sampler import LoRAUse, apply_lora_files, generate
from cntlora_core.diffusion.settings import SamplingSettings
from cntlora_core.figures.sheets import comparison_sheet
from cntlora_core.runtime.progress import Reporter, silent

if TYPE_CHECKING:
    from cntlora_core.diffusion.pipeline import Pipeline

BASE_LABEL = "without a LoRA"
LARGEST_SIDE = 256


@dataclass(frozen=True)
class Comparison:
    """What is generated.

    Attributes:
        prompts: One or more.
        strengths: Each LoRA is generated at each of them.
        seeds: Each prompt is generated with each of them; the same for every LoRA.
        with_base: A row for the model without a LoRA.
        sampling: How each image is generated.
    """

    prompts: tuple[str, ...]
    strengths: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    with_base: bool = True
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        for name in ("prompts", "strengths", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"nothing to compare: give at least one of {name}")


def compare(
    pipeline: Pipeline,
    loras: Sequence[tuple[str, LoRAUse]],
    comparison: Comparison,
    reporter: Reporter = silent,
) -> Image.Image:
    """Generate images of the same prompts and seeds with each LoRA at each strength.

    Args:
        pipeline: Without adapters; it is left without them.
        loras: A label and a LoRA for each row; its own strength multiplies those compared.
        comparison: What to generate.
        reporter: Told the number of pictures done.

    Returns:
        A sheet: one row for each LoRA, one column for each prompt and strength, in each cell one
        picture for each seed.
    """
    prompts, seeds, strengths = comparison.prompts, comparison.seeds, comparison.strengths
    per_pass = len(prompts) * len(seeds)
    total = per_pass * (len(loras) * len(strengths) + comparison.with_base)
    done = 0

    def generated() -> list[list[Image.Image]]:
        nonlocal done
        before = done
        pictures = generate(
            pipeline,
            [prompt for prompt in prompts for _ in seeds],
            comparison.sampling,
            seeds=list(seeds) * len(prompts),
            reporter=lambda stage, n, _, values: reporter(stage, before + n, total, values),
            stage="generating the comparison",
        )
        done += per_pass
        return [pictures[i * len(seeds) : (i + 1) * len(seeds)] for i in range(len(prompts))]

    rows: list[tuple[str, list[list[Image.Image]]]] = []
    if comparison.with_base:
        rows.append((BASE_LABEL, [cell for cell in generated() for _ in strengths]))
    for label, lora in loras:
        try:
            apply_lora_files(pipeline, [lora])
            by_strength = []
            for strength in strengths:
                pipeline.set_adapters(["lora_0"], [lora.strength * strength])
                by_strength.append(generated())
        finally:
            pipeline.unload_lora_weights()
        rows.append((label, [cells[i] for i in range(len(prompts)) for cells in by_strength]))
    columns = [
        prompt if len(strengths) == 1 else f"{prompt}, strength {strength:g}"
        for prompt in prompts
        for strength in strengths
    ]
    side = min(LARGEST_SIDE, rows[0][1][0][0].width)
    return comparison_sheet([], rows, columns, side=max(side, 96))
