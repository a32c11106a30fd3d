"""``cntlora evaluate``: how well pictures show the subject, and follow their prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cntlora_core.diffusion.settings import SamplingSettings, TrainingPrecision
from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter

if TYPE_CHECKING:
    from PIL import Image

    from cntlora_core.diffusion.sampler import LoRAUse
    from cntlora_core.metrics.encoders import Encoders
    from cntlora_core.metrics.fidelity import Fidelity

RECORD_NAME, SHEET_NAME = "fidelity.json", "fidelity.png"


@dataclass(frozen=True)
class Evaluate:
    """Measure subject fidelity (DINO, CLIP-I) and prompt fidelity (CLIP-T), as DreamBooth did.

    Give folders of generated pictures, or a model with LoRA files to generate them with, or both.

    Attributes:
        subject: Folder of real pictures of the subject.
        output: Folder for the numbers, the sheet and the images that are generated.
        generated: Folders of generated pictures; prompts.json or text files beside the pictures
            say their prompts.
        model: Stable Diffusion 1.5 or XL as one .safetensors file, a diffusers folder or a hub id,
            to generate with.
        lora: LoRA files; a strength may follow each after a colon: dog.safetensors:0.8
        base: Generate without a LoRA too.
        prompt: Prompts, or text files (.txt) with one in each line; {token} and {class} are filled
            in, and {} by both. For folders: the prompt of pictures that have none of their own.
        token: The word that stands for the subject; CLIP is not asked for it.
        class_name: What the subject is, for placeholders.
        per_prompt: Pictures for each prompt.
        precision: Data type of the model. auto is bfloat16 on CUDA, float16 on cards without it,
            and float32 elsewhere.
        dino: Vision transformer by hub id or folder; small: the one that comes along, for 64 px.
            Default: facebook/dino-vits16, and small for the small model.
        clip: CLIP model by hub id or folder; small likewise. Default:
            openai/clip-vit-large-patch14.
        device: Where to generate and to measure; default: CUDA, then MPS, then the CPU.
    """

    subject: UserPath
    output: UserPath
    generated: tuple[UserPath, ...] = ()
    model: str | None = None
    lora: tuple[str, ...] = ()
    base: bool = True
    prompt: tuple[str, ...] = ()
    token: str | None = None
    class_name: str | None = None
    per_prompt: int = 4
    sampling: Annotated[SamplingSettings, tyro.conf.arg(name="")] = field(
        default_factory=SamplingSettings
    )
    precision: TrainingPrecision = "auto"
    dino: str | None = None
    clip: str | None = None
    device: str | None = None

    def after_cancel(self) -> str:
        return "; the images generated so far are kept"

    def run(self, reporter: Reporter) -> None:
        from cntlora_core.metrics.view import fidelity_table, prompt_table
        from cntlora_core.runtime.console import result_console

        results = self.evaluate(reporter)
        console = result_console()
        for result in results:
            if result.by_prompt:
                console.print(prompt_table(result))
        console.print(fidelity_table(results))
        for name in (RECORD_NAME, SHEET_NAME):
            print(self.output / name)

    def evaluate(self, reporter: Reporter) -> list[Fidelity]:
        """Measure everything, and write numbers and sheet.

        Raises:
            ValueError, OSError: for input that cannot be used, in words.
        """
        from cntlora_core.data.photos import load_photos
        from cntlora_core.diffusion.pipeline import model_family
        from cntlora_core.diffusion.sampler import checked_device
        from cntlora_core.diffusion.validation import require_unicode
        from cntlora_core.figures.sheets import save_image
        from cntlora_core.metrics.fidelity import measure, measure_photos, subject_features
        from cntlora_core.metrics.view import fidelity_sheet
        from cntlora_core.runtime.files import require_writable_folder, write_json_atomic

        if not self.generated and self.model is None:
            raise ValueError("nothing to measure: give --generated folders, or --model and --lora")
        if self.lora and self.model is None:
            raise ValueError("LoRA files need a --model to generate with")
        prompts = self._prompts() if self.prompt else ()  # as all else, before anything is loaded
        require_unicode("prompt", *prompts, self.token, self.class_name)
        if self.per_prompt < 1:
            raise ValueError(f"per_prompt must be at least 1, got {self.per_prompt}")
        for lora in self._loras():
            for note in lora.check(model_family(str(self.model)).files):
                reporter("loading the model", 0, 0, {"note": note})
        checked_device(self.device)
        require_writable_folder(self.output)
        encoders = self._encoders(reporter)
        photos = [p.image for p in load_photos(self.subject, read_captions=False).photos]
        features = subject_features(encoders, photos, reporter)
        itself = measure_photos(features)
        results, shown = [], []
        for label, pictures, prompts in self._sets(reporter):
            results.append(
                measure(
                    encoders,
                    features,
                    pictures,
                    prompts,
                    token=self.token,
                    label=label,
                    reporter=reporter,
                )
            )
            shown.append((pictures, prompts))
            for note in results[-1].notes:
                reporter("measuring", 0, 0, {"note": note})
        save_image(fidelity_sheet(photos, results, shown), self.output / SHEET_NAME)
        everything = [*results, *([itself] if itself else [])]
        record: dict[str, Any] = {
            "encoders": encoders.sources,
            "subject": str(self.subject),
            "photos": len(photos),
            "token": self.token,
            "results": [result.to_dict() for result in everything],
        }
        write_json_atomic(self.output / RECORD_NAME, record)
        return everything

    def _encoders(self, reporter: Reporter) -> Encoders:
        from cntlora_core.diffusion.sampler import checked_device
        from cntlora_core.metrics.encoders import load_encoders_for

        reporter("loading the encoders", 0, 1, {})
        encoders = load_encoders_for(
            self.model, self.dino, self.clip, device=checked_device(self.device)
        )
        reporter("loading the encoders", 1, 1, {})
        return encoders

    def _sets(self, reporter: Reporter) -> Any:
        """Label, pictures and prompts of each set: the folders', then those that are generated."""
        from cntlora_core.metrics.pictures import read_pictures

        asked = self._prompts() if self.prompt else ()
        if self.generated and self.model is None and len(asked) > 1:
            raise ValueError(
                f"{len(asked)} prompts for folders of pictures: only one can stand for all; "
                "name each picture's own in prompts.json or in a text file beside it"
            )
        for folder in self.generated:
            found = read_pictures(folder, asked[0] if len(asked) == 1 else None)
            for note in found.notes:
                reporter("measuring", 0, 0, {"note": note})
            yield folder.resolve().name, list(found.pictures), found.prompts
        if self.model is not None:
            yield from self._generated(reporter)

    def _prompts(self) -> tuple[str, ...]:
        from cntlora_core.data.captions import subject_prompts
        from cntlora_core.metrics.pictures import read_prompts

        words = subject_prompts(self.token, self.class_name) if self.class_name else None
        return read_prompts(self.prompt, words)

    def _loras(self) -> list[LoRAUse]:
        from cntlora_core.diffusion.sampler import LoRAUse

        return [LoRAUse.parse(text) for text in self.lora]

    def _generated(self, reporter: Reporter) -> Any:
        from cntlora_core.diffusion.sampler import load_for_sampling
        from cntlora_core.metrics.generation import (
            GenerationSettings,
            folder_names,
            generate_each,
            save_generated,
        )
        from cntlora_core.runtime.files import folder_within

        bare = self.base or not self.lora
        settings = GenerationSettings(self._prompts(), self.per_prompt, bare, self.sampling)
        loras = self._loras()
        folders = folder_names(loras)
        reporter("loading the model", 0, 1, {})
        pipeline = load_for_sampling(
            str(self.model),
            precision=self.precision,
            device=self.device,
            scheduler=self.sampling.scheduler,
            clip_skip=self.sampling.clip_skip,
            prediction_type=self.sampling.prediction_type,
        )
        reporter("loading the model", 1, 1, {})
        for label, pictures in generate_each(pipeline, loras, settings, reporter):
            images: list[Image.Image] = pictures
            save_generated(folder_within(self.output, folders[label]), images, settings)
            yield label, images, settings.all_prompts
