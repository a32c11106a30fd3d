"""``cntlora sample``: generated images from a checkpoint and LoRA files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from cntlora_core.diffusion.settings import Precision, SamplingSettings
from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter

MOST_PER_PROMPT = 100_000


@dataclass(frozen=True)
class Sample:
    """Draw pictures from a checkpoint and any number of LoRA files.

    Attributes:
        model: Stable Diffusion 1.5 or XL as one .safetensors file, a diffusers folder or a hub id.
        prompt: One or more prompts.
        output: Folder for the pictures.
        lora: LoRA files; a strength may follow each after a colon: dog.safetensors:0.8
        per_prompt: Pictures for each prompt.
        precision: Data type of the model.
        device: Where to generate; default: CUDA, then MPS, then the CPU.
    """

    model: str
    prompt: tuple[str, ...]
    output: UserPath
    lora: tuple[str, ...] = ()
    per_prompt: int = 1
    sampling: Annotated[SamplingSettings, tyro.conf.arg(name="")] = field(
        default_factory=SamplingSettings
    )
    precision: Precision = "float32"
    device: str | None = None

    def after_cancel(self) -> str:
        return "; the images generated so far are kept"

    def run(self, reporter: Reporter) -> None:
        from cntlora_core.diffusion.sampler import LoRAUse, generate, load_for_sampling
        from cntlora_core.diffusion.validation import require_unicode
        from cntlora_core.figures.sheets import save_image
        from cntlora_core.metrics.pictures import write_prompts
        from cntlora_core.runtime.file_names import safe_name
        from cntlora_core.runtime.files import require_writable_folder

        if not self.prompt:
            raise ValueError("give at least one --prompt")
        if not 1 <= self.per_prompt <= MOST_PER_PROMPT:
            raise ValueError(
                f"per_prompt must be at least 1 and at most {MOST_PER_PROMPT}, got "
                f"{self.per_prompt}"
            )
        require_unicode("prompt", *self.prompt)
        folder = require_writable_folder(self.output)
        reporter("loading the model", 0, 1, {})
        pipeline = load_for_sampling(
            self.model,
            [LoRAUse.parse(text) for text in self.lora],
            precision=self.precision,
            device=self.device,
            scheduler=self.sampling.scheduler,
            clip_skip=self.sampling.clip_skip,
            reporter=reporter,
        )
        reporter("loading the model", 1, 1, {})
        prompts = [prompt for prompt in self.prompt for _ in range(self.per_prompt)]
        at_once = self.sampling.batch_size
        for start in range(0, len(prompts), at_once):
            chosen = prompts[start : start + at_once]
            seeds = [self.sampling.seed + start + i for i in range(len(chosen))]
            pictures = generate(
                pipeline,
                chosen,
                self.sampling,
                seeds=seeds,
                reporter=lambda stage, done, total, values, start=start: reporter(
                    stage, start + done, len(prompts), values
                ),
            )
            prompt_of: dict[str, str] = {}
            for prompt, seed, picture in zip(chosen, seeds, pictures, strict=True):
                path = folder / f"{safe_name(prompt, max_length=60)}-{seed}.png"
                save_image(picture, path)
                prompt_of[path.name] = prompt
                print(path)
            write_prompts(folder, prompt_of)
