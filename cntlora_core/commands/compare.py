"""``cntlora compare``: the LoRAs that a run kept, side by side and scored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cntlora_core.diffusion.settings import Precision, PredictionType, SamplingSettings
from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter

if TYPE_CHECKING:
    from PIL import Image

    from cntlora_core.data.captions import SubjectPrompts
    from cntlora_core.metrics.encoders import Encoders
    from cntlora_core.metrics.steps import StepComparison

SCENES = ("", " in the snow", " on the beach", " in a forest")
"""What the default prompts put the subject into: a step that learnt too much loses them."""


@dataclass(frozen=True)
class Compare:
    """Show the LoRAs that a run kept side by side, score them, and name the best trade-off.

    A row for each prompt; a column for the model without a LoRA, for each snapshot and for the
    run's LoRA; the same seeds in all. The best step has the largest balance: the harmonic mean of
    subject fidelity (DINO, from 0 without a LoRA to 1 for the photos among themselves) and prompt
    fidelity (CLIP-T, from 1 without a LoRA to 0 for the photos under the same prompts).

    Attributes:
        run_folder: The output folder of `cntlora train --save-lora-every N`.
        output: The picture (.jpg, .png or .webp); the numbers go beside it, ending in .json.
            Default: compare.jpg in the run's folder.
        prompt: Prompts, or text files (.txt) with one in each line; {token} and {class} are filled
            in, and {} by both. Default: the run's own sample prompts, else the subject alone, in
            the snow, on the beach and in a forest.
        per_prompt: Images for each prompt and step.
        model: The model, where it is no longer where the run had it.
        subject: Folder of photos of the subject, to measure with; default: the run's.
        scores: Measure; without it the picture alone is made.
        precision: Data type of the model; default: the run's.
        dino: Vision transformer by hub id or folder; small: the one that comes along, for 64 px.
            Default: facebook/dino-vits16 if the hub's cache has it, and small for the small model.
        clip: CLIP model by hub id or folder; small likewise. Default:
            openai/clip-vit-large-patch14 likewise.
        device: Where to generate and to measure; default: CUDA, then MPS, then the CPU.
    """

    run_folder: tyro.conf.Positional[UserPath]
    output: UserPath | None = None
    prompt: tuple[str, ...] = ()
    per_prompt: int = 2
    model: str | None = None
    subject: UserPath | None = None
    scores: bool = True
    sampling: Annotated[SamplingSettings, tyro.conf.arg(name="")] = field(
        default_factory=SamplingSettings
    )
    precision: Precision | None = None
    dino: str | None = None
    clip: str | None = None
    device: str | None = None

    def after_cancel(self) -> str:
        return "; nothing was written"

    def run(self, reporter: Reporter) -> None:
        from cntlora_core.runtime.console import result_console

        found = self.compare(reporter)
        if found.results:
            console = result_console()
            console.print(found.table())
            console.print(found.verdict(), highlight=False)
        print(self._sheet)
        print(self._sheet.with_suffix(".json"))

    @property
    def _sheet(self) -> Path:
        from cntlora_core.diffusion.run_folder import COMPARISON_NAME

        return self.output or self.run_folder / COMPARISON_NAME

    def compare(self, reporter: Reporter) -> StepComparison:
        """Generate, measure, and write picture and numbers.

        Raises:
            ValueError, OSError: for input that cannot be used, in words.
        """
        from cntlora_core.diffusion.pipeline import model_family
        from cntlora_core.diffusion.sampler import LoRAUse, load_for_sampling
        from cntlora_core.diffusion.snapshots import loras_of_run
        from cntlora_core.figures.sheets import save_image
        from cntlora_core.metrics.generation import GenerationSettings
        from cntlora_core.metrics.steps import compare_steps
        from cntlora_core.runtime.files import require_writable_folder, write_json_atomic

        if self._sheet.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp"):
            raise ValueError(f"output must end in .jpg, .png or .webp, got {str(self._sheet)!r}")
        loras = [(lora.step, LoRAUse.read(lora.path)) for lora in loras_of_run(self.run_folder)]
        if len(loras) == 1:
            reporter("notes", 0, 0, {"note": "the run kept no snapshots: only its LoRA is shown"})
        run = _Run.read(self.run_folder)
        asked = self._prompts(run)
        sampling = dataclasses.replace(
            self.sampling,
            resolution=self.sampling.resolution or run.resolution,
            clip_skip=max(self.sampling.clip_skip, run.clip_skip),
            prediction_type=self.sampling.prediction_type or run.prediction_type,
        )
        settings = GenerationSettings(asked, self.per_prompt, sampling=sampling)
        require_writable_folder(self._sheet.parent)
        files = model_family(self.model or run.model).files
        for _, use in loras:
            use.check(files)
        photos, encoders = self._photos(run, reporter), None
        if photos:
            encoders = self._encoders(run, reporter)
        reporter("loading the model", 0, 1, {})
        pipeline = load_for_sampling(
            self.model or run.model,
            precision=self.precision or run.precision,
            device=self.device,
            scheduler=sampling.scheduler,
            clip_skip=sampling.clip_skip,
            prediction_type=sampling.prediction_type,
        )
        reporter("loading the model", 1, 1, {})
        found = compare_steps(
            pipeline,
            loras,
            settings,
            photos=photos,
            encoders=encoders,
            token=run.prompts.token,
            reporter=reporter,
        )
        for note in found.notes:
            reporter("measuring", 0, 0, {"note": note})
        record: dict[str, Any] = {
            "run": str(self.run_folder),
            "model": self.model or run.model,
            "prompts": list(asked),
            "seeds": settings.all_seeds[: self.per_prompt],
            "sampling": dataclasses.asdict(sampling),
            "encoders": None if encoders is None else encoders.sources,
            "photos": len(photos),
            **found.to_dict(),
        }
        save_image(found.sheet, self._sheet)
        write_json_atomic(self._sheet.with_suffix(".json"), record)
        return found

    def _prompts(self, run: _Run) -> tuple[str, ...]:
        from cntlora_core.data.prompts import filled_prompt
        from cntlora_core.diffusion.validation import require_unicode
        from cntlora_core.metrics.pictures import read_prompts

        require_unicode("prompt", *self.prompt)
        if self.prompt:
            return read_prompts(self.prompt, run.prompts)
        instance = run.prompts.instance_prompt
        own = tuple(filled_prompt(prompt, run.prompts) for prompt in run.sample_prompts)
        return own or tuple(instance + scene for scene in SCENES)

    def _photos(self, run: _Run, reporter: Reporter) -> list[Image.Image]:
        from cntlora_core.data.photos import load_photos

        folder = self.subject or (Path(run.images) if run.images else None)
        if not self.scores:
            return []
        if folder is None or (self.subject is None and not folder.is_dir()):
            note = f"no scores: the run's photos are not at {str(run.images)!r}; give --subject"
            reporter("notes", 0, 0, {"note": note})
            return []
        return [photo.image for photo in load_photos(folder, read_captions=False).photos]

    def _encoders(self, run: _Run, reporter: Reporter) -> Encoders | None:
        from cntlora_core.diffusion.sampler import checked_device
        from cntlora_core.metrics.encoders import load_encoders_for

        given = bool(self.dino or self.clip)
        reporter("loading the encoders", 0, 1, {})
        try:
            encoders = load_encoders_for(
                self.model or run.model,
                self.dino,
                self.clip,
                device=checked_device(self.device),
                local_files_only=not given,
            )
        except FileNotFoundError as error:
            if given:
                raise
            note = f"no scores: {error} `cntlora evaluate` downloads the usual ones"
            reporter("notes", 0, 0, {"note": note})
            return None
        reporter("loading the encoders", 1, 1, {})
        return encoders


@dataclass(frozen=True)
class _Run:
    """What the record of a run says of how to generate and to measure."""

    model: str
    prompts: SubjectPrompts
    sample_prompts: tuple[str, ...]
    images: str
    resolution: int | None
    precision: Precision
    clip_skip: int
    prediction_type: PredictionType | None

    @classmethod
    def read(cls, folder: Path) -> _Run:
        from cntlora_core.data.captions import SubjectPrompts
        from cntlora_core.diffusion.run_identity import RECORD_NAME
        from cntlora_core.runtime.reading import read_json_object, reading

        path = folder / RECORD_NAME
        with reading(path, "the record of a run"):
            record = read_json_object(path)
            settings = record["settings"]
            return cls(
                model=str(record["model"]["source"]),
                prompts=SubjectPrompts(**record["prompts"]),
                sample_prompts=tuple(settings["training"]["sample_prompts"]),
                images=str(settings["subject"]["images"]),
                resolution=settings["subject"]["resolution"],
                precision=settings["training"]["precision"],
                clip_skip=int(settings.get("clip_skip", 1)),
                prediction_type=settings.get("prediction_type"),
            )
