"""``cntlora sample``: generated images from a checkpoint and LoRA files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from cntlora_core.diffusion.settings import SamplingSettings, TrainingPrecision
from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter

MOST_PER_PROMPT = 100_000


@dataclass(frozen=True)
class Sample:
    """Generate images from a checkpoint and any number of LoRA files.

    Images that are in the folder already stay: where another one has the name, a number is added.
    prompts.json in it says each image's prompt, LoRAs and strengths.

    Attributes:
        model: Stable Diffusion 1.5 or XL as one .safetensors file, a diffusers folder or a hub id.
        prompt: One or more prompts; {token} and {class} are filled in from the LoRA, and {} by
            both.
        output: Folder for the pictures.
        lora: LoRA files; a strength may follow each after a colon: dog.safetensors:0.8
        per_prompt: Pictures for each prompt.
        precision: Data type of the model. auto is bfloat16 on CUDA, float16 on cards without it,
            and float32 elsewhere.
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
    precision: TrainingPrecision = "auto"
    device: str | None = None

    def after_cancel(self) -> str:
        return "; the images generated so far are kept"

    def run(self, reporter: Reporter) -> None:
        from cntlora_core.data.prompts import prompts_for_loras, taught_subject
        from cntlora_core.diffusion.sampler import LoRAUse, generate, load_for_sampling
        from cntlora_core.diffusion.validation import require_unicode
        from cntlora_core.figures.sheets import save_beside
        from cntlora_core.lora_file.contents import read_contents
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
        loras = [LoRAUse.parse(text) for text in self.lora]
        headers = (read_contents(lora.path).metadata for lora in loras)
        named = (header for header in headers if taught_subject(header) is not None)
        asked = prompts_for_loras(self.prompt, named)  # beside a LoRA of a style, for example
        folder = require_writable_folder(self.output)
        reporter("loading the model", 0, 1, {})
        pipeline = load_for_sampling(
            self.model,
            loras,
            precision=self.precision,
            device=self.device,
            scheduler=self.sampling.scheduler,
            clip_skip=self.sampling.clip_skip,
            prediction_type=self.sampling.prediction_type,
            reporter=reporter,
        )
        reporter("loading the model", 1, 1, {})
        prompts = [prompt for prompt in asked for _ in range(self.per_prompt)]
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
                name = f"{safe_name(prompt, max_length=60)}-{seed}.png"
                path = save_beside(picture, folder / name)
                prompt_of[path.name] = prompt
                print(path)
            write_prompts(folder, prompt_of, loras)
