"""``cntlora demo``: the main job on the embedded small model, and a sheet of what it did."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

SHEET_NAME = "before_and_after.png"
DEFAULT_SUBJECT = "penguin"
PICTURES_PER_PROMPT = 3
GUIDANCE = 2.5  # the small model: more makes colours glare


@dataclass(frozen=True)
class Demo:
    """The main job on the embedded small model, in a few minutes on two CPU cores.

    Attributes:
        output: Folder for everything that the demo leaves.
        subject: Which of the embedded subjects; default: the penguin.
        method: How the adapter is initialised; `cntlora methods` describes them.
        steps: Training steps.
    """

    output: UserPath = Path("demo_output")
    subject: str | None = None
    method: Method = "cross"
    steps: int = 1000

    def after_cancel(self) -> str:
        return "; the demo starts anew next time"

    def run(self, reporter: Reporter) -> None:
        sheet = run_demo(
            self.output,
            subject_name=self.subject,
            method=self.method,
            steps=self.steps,
            reporter=reporter,
        )
        print(sheet)


def demo_settings(
    output: Path,
    subject: mini.MiniSubject,
    *,
    method: Method = "cross",
    steps: int = 1000,
    class_images: int = 50,
    sampling_steps: int = 30,
) -> JobSettings:
    """The paper's settings, at a rank that fits the small model's widths of 64 to 192."""
    return JobSettings(
        model=str(mini.model_path()),
        subject=SubjectSettings(
            images=str(subject.photos), token=subject.token, class_name=subject.class_name
        ),
        output=OutputSettings(output=str(output), keep_state=False),
        prior=PriorSettings(
            num_class_images=class_images,
            class_guidance=GUIDANCE,
            class_steps=sampling_steps,
            cache=str(output / "cache"),
        ),
        adapter=AdapterSettings(method=method, rank=16, alpha=32, init_passes=8),
        training=TrainingSettings(steps=steps, device="cpu"),
    )


def run_demo(
    output: Path,
    *,
    subject_name: str | None = None,
    method: Method = "cross",
    steps: int = 1000,
    class_images: int = 50,
    sampling_steps: int = 30,
    reporter: Reporter = silent,
) -> Path:
    """Personalise the small model, generate with and without the LoRA, and put it side by side.

    Returns:
        The sheet: the subject's photos, the base model and the trained one, for several prompts.

    Raises:
        ValueError: for a subject that is not embedded, or settings that make no sense.
    """
    from cntlora_core.data.photos import load_photos
    from cntlora_core.diffusion.job import personalise
    from cntlora_core.diffusion.sampler import (
        LoRAUse,
        apply_lora_files,
        generate,
        load_for_sampling,
    )
    from cntlora_core.figures.sheets import comparison_sheet, save_image

    started = time.perf_counter()
    subject = mini.subject(subject_name or DEFAULT_SUBJECT)
    settings = demo_settings(
        output,
        subject,
        method=method,
        steps=steps,
        class_images=class_images,
        sampling_steps=sampling_steps,
    )
    result = personalise(settings, overwrite=True, reporter=reporter)

    pipeline = load_for_sampling(settings.model, device="cpu")
    sampling = SamplingSettings(steps=sampling_steps, guidance=GUIDANCE, batch_size=15)
    prompts = demo_prompts(subject)
    asked = [prompt for prompt in prompts for _ in range(PICTURES_PER_PROMPT)]
    before = generate(pipeline, asked, sampling, reporter=reporter, stage="generating: base model")
    apply_lora_files(pipeline, [LoRAUse(result.lora)])
    after = generate(
        pipeline, asked, sampling, reporter=reporter, stage="generating: trained model"
    )

    count = PICTURES_PER_PROMPT
    rows = [
        (prompt, [pictures[i * count : (i + 1) * count] for pictures in (before, after)])
        for i, prompt in enumerate(prompts)
    ]
    photos = [photo.image for photo in load_photos(subject.photos).photos]
    sheet = comparison_sheet(
        photos, rows, ["base model", f"with the LoRA ({method}, {steps} steps)"], side=112
    )
    save_image(sheet, output / SHEET_NAME)
    _complete_record(output, sampling, asked, time.perf_counter() - started)
    return output / SHEET_NAME


def demo_prompts(subject: mini.MiniSubject) -> list[str]:
    """The instance prompt and four of the subject's own."""
    name = f"{subject.token} {subject.class_name}"
    return [f"a photo of {name}", *(text.format(name) for text in subject.prompts[:4])]


def _complete_record(
    output: Path, sampling: SamplingSettings, prompts: list[str], seconds: float
) -> None:
    from cntlora_core.diffusion.job import RECORD_NAME
    from cntlora_core.runtime.files import write_json_atomic

    record: dict[str, Any] = json.loads((output / RECORD_NAME).read_text("utf-8"))
    record["demo"] = {
        "prompts": prompts,
        "sampling": sampling.__dict__,
        "sheet": SHEET_NAME,
        "total_seconds": seconds,
    }
    write_json_atomic(output / RECORD_NAME, record)
