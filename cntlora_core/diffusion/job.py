"""The main job: photos of a subject in, a LoRA file and the record of the run out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cntlora_core.data.photos import PhotoSet
from cntlora_core.diffusion.export import ExportReport, export_lora
from cntlora_core.diffusion.family import Networks
from cntlora_core.diffusion.from_lora import fingerprint_from_lora, require_family
from cntlora_core.diffusion.packages import require_packages
from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
from cntlora_core.diffusion.prior import cache_folder, class_images
from cntlora_core.diffusion.record import JobResult, ModelFacts, file_metadata, run_record
from cntlora_core.diffusion.run_folder import (
    LOSS_NAME,
    PHOTOS_NAME,
    RANKS_NAME,
    SAMPLES_NAME,
    check_folder,
    lora_path,
    sample_names,
)
from cntlora_core.diffusion.run_identity import (
    RECORD_NAME,
    STATE_NAME,
    check_same_run,
    run_identity,
)
from cntlora_core.diffusion.run_lock import only_run_in
from cntlora_core.diffusion.sampler import checked_device, generate
from cntlora_core.diffusion.settings import JobSettings, SamplingSettings
from cntlora_core.diffusion.snapshots import remove_snapshots, snapshots_in, write_snapshot
from cntlora_core.diffusion.stages import (
    Initialization,
    Subject,
    encode_class_images,
    encode_held_out,
    encode_subject,
    plan_initialization,
    read_subject,
    training_data,
    training_resolution,
)
from cntlora_core.diffusion.state import TrainingState
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.diffusion.watching import HeldOutLoss, Trackers
from cntlora_core.figures.plots import plot_loss, plot_ranks
from cntlora_core.figures.sheets import photo_sheet, save_image
from cntlora_core.methods import get_method
from cntlora_core.methods.peft_model import ROUNDING_TO_MENTION
from cntlora_core.runtime.files import folder_within, require_writable_folder, write_json_atomic
from cntlora_core.runtime.memory import freed_memory_kept
from cntlora_core.runtime.modes import evaluating
from cntlora_core.runtime.precision import best_precision
from cntlora_core.runtime.progress import Reporter, silent, stage_progress
from cntlora_core.runtime.threads import threads, threads_for

if TYPE_CHECKING:
    from cntlora_core.diffusion.pipeline import Pipeline


@dataclass
class _Run:
    """Notes and timings of a run under way, and what its end undoes."""

    reporter: Reporter
    end: ExitStack = field(default_factory=ExitStack)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, *texts: str) -> None:
        for text in texts:
            self.notes.append(text)
            self.reporter("notes", 0, 0, {"note": text})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def personalise(
    settings: JobSettings,
    *,
    subject: Subject | None = None,
    class_photos: PhotoSet | None = None,
    initialization: Initialization | None = None,
    resume: bool = False,
    overwrite: bool = False,
    header: Mapping[str, str] | None = None,
    reporter: Reporter = silent,
) -> JobResult:
    """Teach a Stable Diffusion model a subject.

    Args:
        settings: All there is to decide.
        subject: The subject, read already; default: read from the settings.
        class_photos: The class images, generated already; default: as the settings say.
        initialization: The adapter's initialisation, planned already with the adapter settings;
            default: planned now.
        resume: Go on from the state that a run left in the output folder: an interrupted one to its
            end, a finished one to more steps, or to nothing but another LoRA file, of another name,
            layout, precision or compression.
        overwrite: Start anew even where the output folder holds such a state or a finished run.
        header: Texts for the header of the LoRA file, beside those that every file has.
        reporter: Told all along what is being done; what it raises ends the run cleanly.

    Raises:
        ValueError: for photos, prompts, a model or settings that cannot be used, in words, a
            package that is missing among them; if the run to resume is another one, or has done
            more steps than are asked for.
        FileExistsError: if the output folder holds a run and neither flag is given.
        BlockingIOError: if another run is at work in the output folder.
        OSError: if the output folder cannot be written to.
        NonFiniteLossError: if training blows up; the last good state is kept.
    """
    if initialization is not None and initialization.adapter != settings.adapter:
        raise ValueError(
            "the initialisation was planned with other adapter settings than the run's"
        )
    require_packages(settings.training)
    device = checked_device(settings.training.device)
    run = _Run(reporter)
    folder = require_writable_folder(settings.output.output)
    with only_run_in(folder), torch.inference_mode(False), run.end:
        check_folder(folder, resume, overwrite)
        state = TrainingState.load(folder / STATE_NAME) if resume else None
        settings = _with_precision(settings, device, state)
        if state is not None:
            check_same_run(state, {"job": settings.to_dict()})
        from_lora = (
            initialization.from_lora
            if initialization is not None
            else fingerprint_from_lora(settings.adapter)
        )
        with run.timed("photos"):
            subject = subject or read_subject(settings.subject)
        run.note(*subject.notes)
        lora_path(folder, settings, subject)  # a name that will not do is said before any work
        return _personalise(
            settings,
            subject,
            class_photos,
            initialization,
            from_lora,
            state,
            device,
            folder,
            run,
            header or {},
        )


def _with_precision(
    settings: JobSettings, device: torch.device, state: TrainingState | None
) -> JobSettings:
    """The settings with a precision for "auto": that of the run to resume, or the device's own."""
    if settings.training.precision != "auto":
        return settings
    begun = {} if state is None else state.settings.get("job", {}).get("training", {})
    precision = begun.get("precision", best_precision(device))
    training = dataclasses.replace(settings.training, precision=precision)
    return dataclasses.replace(settings, training=training)


def _personalise(
    settings: JobSettings,
    subject: Subject,
    class_photos: PhotoSet | None,
    initialization: Initialization | None,
    from_lora: str | None,
    state: TrainingState | None,
    device: torch.device,
    folder: Path,
    run: _Run,
    header: Mapping[str, str],
) -> JobResult:
    training, reporter = settings.training, run.reporter
    cache, state_path = cache_folder(settings.prior), folder / STATE_NAME
    with run.timed("loading"):
        reporter("loading the model", 0, 1, {})
        parts = load_stable_diffusion(
            settings.model,
            dtype=training.dtype,
            device=device,
            clip_skip=settings.clip_skip,
            reporter=reporter,
        )
        reporter("loading the model", 1, 1, {})
    before = None if state is None else state.settings.get("threads")  # sums are rounded by them
    count = before or threads_for(parts.unet)
    run.end.enter_context(threads(count))
    if initialization is not None:
        initialization.require_model(parts)
    require_family(settings.adapter, parts.family)
    with run.timed("encoding"):
        encoded = encode_subject(parts, subject, cache=cache, reporter=reporter)
    run.note(*encoded.notes)
    others = None
    if settings.prior.prior_weight == 0:
        class_photos = None
    else:
        if class_photos is None:
            class_photos = _class_photos(parts, subject, settings, run)
        with run.timed("encoding"):
            others = encode_class_images(
                parts, subject, class_photos, cache=cache, reporter=reporter
            )
        run.note(*others.notes)
    data = training_data(encoded, others)
    seed = training.seed if initialization is None else initialization.seed
    identity = run_identity(parts.fingerprint, subject, class_photos, seed, from_lora)
    model, networks, family = ModelFacts.of(parts), parts.networks, parts.family
    noise_scheduler = parts.noise_scheduler
    preview = parts.pipeline() if training.sample_prompts else None

    if state is not None:
        check_same_run(state, {"identity": identity})
        plan, report = state.plan, state.settings.get("initialization")
    else:
        state_path.unlink(missing_ok=True)  # of a run that is not gone on with
        remove_snapshots(folder)
        with run.timed("initialization"):
            initialization = initialization or plan_initialization(
                parts, encoded, settings.adapter, seed=seed, reporter=reporter
            )
        if initialization.report is not None:
            run.note(initialization.report.summary())
        plan = initialization.plan
        report = initialization.report.to_dict() if initialization.report is not None else None
    with run.timed("encoding"):
        held_out = encode_held_out(parts, subject, cache=cache, reporter=reporter)
    held_out_loss = None if held_out is None else HeldOutLoss(parts, held_out)
    del parts  # and with it the VAE, unless samples are generated
    masked = settings.subject.unmasked_weight < 1
    sheet = photo_sheet(subject.photos.photos, subject.names, encoded.frames, masked=masked)
    save_image(sheet, folder / PHOTOS_NAME)

    trainer = SubjectTrainer(
        networks,
        family,
        noise_scheduler,
        plan,
        data,
        adapter=settings.adapter,
        training=training,
        prior_weight=settings.prior.prior_weight,
        settings={
            "job": settings.to_dict(),
            "identity": identity,
            "initialization": report,
            "threads": count,
        },
    )
    if trainer.largest_rounding > ROUNDING_TO_MENTION:
        own = get_method(settings.adapter.method).family == "cntlora"
        run.note(
            f"rounding the rewritten base weights to {training.precision} lost up to "
            f"{trainer.largest_rounding:.1%} of them, in training and in the file: use float32 for "
            f"the base{', or --cntlora.no-preserve-output' if own else ''}"
        )
    if state is not None:
        trainer.restore(state)
        left = training.steps - state.step
        run.note(
            f"going on after step {state.step} of {training.steps}"
            if left
            else f"all {state.step} steps were done before: only the LoRA file is written"
        )

    def export(path: Path) -> ExportReport:
        stem = path.name if settings.output.layout == "peft" else path.stem
        return export_lora(
            networks,
            plan,
            path,
            settings.output,
            {
                **header,
                **file_metadata(stem, settings, subject.prompts, subject.photos, model, trainer),
            },
            family.files,
            stage_progress(reporter, "factoring for the file"),
        )

    target = lora_path(folder, settings, subject)
    keep = _snapshooter(export, settings, folder, target)
    trackers = Trackers(settings, folder, target.stem, trainer.step)
    run.end.callback(trackers.finish)
    show = _previewer(preview, networks, settings, folder, trackers, reporter)

    def after_step(step: int) -> None:
        due = step % training.held_out_every == 0 or step == training.steps
        if held_out_loss is not None and due:
            trainer.history[-1]["held_out_loss"] = held_out_loss()
        trackers.follow(trainer.history)
        keep(step)
        if show is not None:
            show(step)

    with run.timed("training"), freed_memory_kept(device.type == "cpu"):
        keep(trainer.step)  # it is missing where a run was stopped or ended at that step
        untrained = held_out_loss() if held_out_loss is not None and trainer.step == 0 else None
        trainer.run(reporter=reporter, state_path=state_path, after_step=after_step)
    run.notes += trainer.notes
    run.note(*_held_out_note(trainer.history, untrained))
    return _finish(trainer, settings, subject, model, report, run, target, identity, export)


def _held_out_note(history: Sequence[dict[str, float]], untrained: float | None) -> list[str]:
    """Where the loss on held-out photos was lowest, for a person who asks which step to take."""
    found = {i: r["held_out_loss"] for i, r in enumerate(history, 1) if "held_out_loss" in r}
    if not found:
        return []
    best = min(found, key=found.__getitem__)
    before = "" if untrained is None else f"{untrained:.4f} before training, "
    return [
        f"loss on the held-out photos: {before}lowest at step {best} ({found[best]:.4f}), "
        f"{found[max(found)]:.4f} at the end"
    ]


def _class_photos(
    parts: StableDiffusionParts, subject: Subject, settings: JobSettings, run: _Run
) -> PhotoSet:
    with run.timed("class images"):
        return class_images(
            parts,
            subject.prompts.class_prompt,
            settings.prior,
            resolution=training_resolution(parts, settings.subject),
            reporter=run.reporter,
        )


def _finish(
    trainer: SubjectTrainer,
    settings: JobSettings,
    subject: Subject,
    model: ModelFacts,
    report: dict[str, Any] | None,
    run: _Run,
    target: Path,
    identity: dict[str, Any],
    write: Callable[[Path], ExportReport],
) -> JobResult:
    prompts, folder = subject.prompts, target.parent
    run.reporter("writing the LoRA file", 0, 1, {})
    with run.timed("export"):
        export = write(target)
    run.reporter("writing the LoRA file", 1, 1, {})
    run.note(export.summary())
    plot_loss(trainer.history, folder / LOSS_NAME, f"{settings.adapter.method}: {target.stem}")
    plot_ranks(trainer.plan.ranks, folder / RANKS_NAME, f"{settings.adapter.method}: ranks")
    result = JobResult(
        lora=export.path,
        folder=folder,
        export=export,
        initialization=report,
        history=trainer.history,
        seconds=run.seconds,
        notes=tuple(run.notes),
        snapshots=tuple(snapshots_in(folder)),
    )
    write_json_atomic(folder / RECORD_NAME, run_record(result, settings, prompts, model, identity))
    if not settings.output.keep_state:
        (folder / STATE_NAME).unlink(missing_ok=True)
    return result


def _snapshooter(
    export: Callable[[Path], ExportReport], settings: JobSettings, folder: Path, target: Path
) -> Callable[[int], None]:
    """What keeps the LoRA of a step that is due, unless it is there already."""
    every, last = settings.output.save_lora_every, settings.training.steps

    def after_step(step: int) -> None:
        due = every > 0 and 0 < step < last and step % every == 0
        if due and step not in {snapshot.step for snapshot in snapshots_in(folder)}:
            write_snapshot(folder, target, step, export)

    return after_step


def _previewer(
    pipeline: Pipeline | None,
    networks: Networks,
    settings: JobSettings,
    folder: Path,
    trackers: Trackers,
    reporter: Reporter,
):
    training = settings.training
    if pipeline is None:
        return None

    def after_step(step: int) -> None:
        due = training.sample_every and step % training.sample_every == 0
        if not due and step != training.steps:
            return
        sampling = SamplingSettings(
            steps=training.sample_steps,
            resolution=settings.subject.resolution,
            seed=training.seed,
        )
        prompts, stage = training.sample_prompts, "generating samples"
        with evaluating(*networks.values()):
            pictures = generate(pipeline, prompts, sampling, reporter=reporter, stage=stage)
        samples = folder_within(folder, SAMPLES_NAME)
        names = sample_names(step, prompts)
        for name, picture in zip(names, pictures, strict=True):
            save_image(picture, samples / name)
        trackers.images(step, prompts, pictures)

    return after_step
