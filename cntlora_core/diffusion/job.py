"""The main job: photos of a subject in, a LoRA file and the record of the run out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cntlora_core.data.photos import PhotoSet
from cntlora_core.diffusion.batches import require_shareable
from cntlora_core.diffusion.between_steps import BetweenSteps
from cntlora_core.diffusion.export import ExportReport, export_lora
from cntlora_core.diffusion.from_lora import fingerprint_from_lora, require_family
from cntlora_core.diffusion.material import read_material
from cntlora_core.diffusion.packages import require_packages
from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
from cntlora_core.diffusion.previews import Previews, preview_prompts
from cntlora_core.diffusion.record import JobResult, ModelFacts, file_metadata, run_record
from cntlora_core.diffusion.run_folder import (
    LOSS_NAME,
    PHOTOS_NAME,
    RANKS_NAME,
    check_folder,
    clear_folder,
    lora_path,
)
from cntlora_core.diffusion.run_identity import (
    RECORD_NAME,
    STATE_NAME,
    check_same_run,
    run_identity,
)
from cntlora_core.diffusion.run_lock import only_run_in
from cntlora_core.diffusion.run_log import RunLog
from cntlora_core.diffusion.sampler import checked_device
from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.diffusion.snapshots import keep_own_lora, snapshots_in
from cntlora_core.diffusion.stages import (
    Initialization,
    Subject,
    plan_initialization,
    read_subject,
    training_data,
)
from cntlora_core.diffusion.state import TrainingState
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.diffusion.watching import HeldOutLoss, dynamics_recorder, plot_recorded
from cntlora_core.figures.plots import plot_loss, plot_ranks
from cntlora_core.figures.sheets import photo_sheet, save_image
from cntlora_core.methods import get_method
from cntlora_core.methods.peft_model import ROUNDING_TO_MENTION
from cntlora_core.runtime.files import require_writable_folder, write_json_atomic
from cntlora_core.runtime.memory import freed_memory_kept
from cntlora_core.runtime.precision import best_precision
from cntlora_core.runtime.processes import Processes
from cntlora_core.runtime.progress import Reporter, silent, stage_progress
from cntlora_core.runtime.reading import user_path
from cntlora_core.runtime.threads import threads, threads_for


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
            end, a finished one to more steps (at a constant learning rate), or to nothing but
            another LoRA file, of another name, layout, precision or compression.
        overwrite: Start anew even where the output folder holds such a state or a finished run. It
            is removed when all is ready for the first step: what fails before leaves it as it was.
        header: Texts for the header of the LoRA file, beside those that every file has.
        reporter: Told all along what is being done; what it raises ends the run cleanly.

    Under torch.distributed all processes call this with the same settings, see
    :class:`.SubjectTrainer`; the first writes all files, and all get the result.

    Raises:
        ValueError: for photos, prompts, a model or settings that cannot be used, in words, a
            package that is missing among them; if the run to resume is another one, or has done
            more steps than are asked for.
        FileExistsError: if the output folder holds a run and neither flag is given.
        BlockingIOError: if another run is at work in the output folder.
        OSError: if the output folder cannot be written to.
        NonFiniteLossError: if training blows up; the last good state is kept.
        OtherProcessError: if another process fails.
    """
    if initialization is not None and initialization.adapter != settings.adapter:
        raise ValueError(
            "the initialisation was planned with other adapter settings than the run's"
        )
    require_packages(settings.training)
    device = checked_device(settings.training.device)
    processes = Processes()
    require_shareable(settings.training, processes.count)
    run = RunLog(reporter, processes)
    folder = user_path(settings.output.output)

    def open_folder() -> None:
        if processes.first:
            require_writable_folder(settings.output.output)
            run.end.enter_context(only_run_in(folder))
            check_folder(folder, resume, overwrite, settings.adapter.from_lora)

    with torch.inference_mode(False), run.end:
        processes.run(open_folder, "opening the output folder")
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
        # A name or a prompt that will not do is said before any work.
        lora_path(folder, settings, subject)
        preview_prompts(settings, subject.prompts)
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
    run: RunLog,
    header: Mapping[str, str],
) -> JobResult:
    training, reporter, processes = settings.training, run.reporter, run.processes
    state_path = folder / STATE_NAME
    with run.timed("loading"):
        parts = processes.run(lambda: _load(settings, device, reporter), "loading the model")
    before = None if state is None else state.settings.get("threads")  # sums are rounded by them
    count = before or threads_for(parts.unet)
    run.end.enter_context(threads(count))
    if initialization is not None:
        initialization.require_model(parts)
    require_family(settings.adapter, parts.family)
    material = processes.first_before_others(
        partial(read_material, parts, subject, class_photos, settings, run), "reading the photos"
    )
    encoded, class_photos = material.encoded, material.class_photos
    data = training_data(encoded, material.others)
    seed = training.seed if initialization is None else initialization.seed
    identity = run_identity(parts.fingerprint, subject, class_photos, seed, from_lora)
    model, networks, family = ModelFacts.of(parts), parts.networks, parts.family
    noise_scheduler = parts.noise_scheduler
    prompts = preview_prompts(settings, subject.prompts)
    previews = Previews(parts, prompts, settings, run) if prompts else None

    if state is not None:
        check_same_run(state, {"identity": identity})
        plan, report = state.plan, state.settings.get("initialization")
    else:
        with run.timed("initialization"):
            initialization = initialization or plan_initialization(
                parts, encoded, settings.adapter, seed=seed, reporter=reporter
            )
        if initialization.report is not None:
            run.note(initialization.report.summary())
        plan = initialization.plan
        report = initialization.report.to_dict() if initialization.report is not None else None
    held_out = None if material.held_out is None else HeldOutLoss(parts, material.held_out)
    del parts  # and with it the VAE, unless samples are generated
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

    target, photos = lora_path(folder, settings, subject), subject.photos.photos

    def begin() -> BetweenSteps | None:
        if not processes.first:
            return None
        if state is None:
            clear_folder(folder)
        elif state.step < training.steps and (kept := keep_own_lora(folder)) is not None:
            run.note(f"the LoRA of step {kept.step} is kept as {kept.path.relative_to(folder)}")
        masked = settings.subject.unmasked_weight < 1
        sheet = photo_sheet(photos, subject.names, encoded.frames, masked=masked)
        save_image(sheet, folder / PHOTOS_NAME)
        between = BetweenSteps(
            trainer, settings, target, export, held_out=held_out, previews=previews
        )
        run.end.callback(between.finish)
        between.begin()
        return between

    with run.timed("training"), freed_memory_kept(device.type == "cpu"):
        between = processes.run(begin, "beginning the training")
        trainer.run(
            reporter=reporter,
            state_path=state_path if processes.first else None,
            after_step=between,
            recorder=dynamics_recorder(trainer, folder) if processes.first else None,
        )
    run.notes += trainer.notes
    if between is not None:
        run.note(*between.notes())

    def finish() -> JobResult | None:
        if not processes.first:
            return None
        return _finish(trainer, settings, subject, model, report, run, target, identity, export)

    result = processes.gather(processes.run(finish, "writing the LoRA file"))[0]
    assert result is not None
    return result


def _load(settings: JobSettings, device: torch.device, reporter: Reporter) -> StableDiffusionParts:
    reporter("loading the model", 0, 1, {})
    parts = load_stable_diffusion(
        settings.model,
        dtype=settings.training.dtype,
        device=device,
        clip_skip=settings.clip_skip,
        prediction_type=settings.prediction_type,
        reporter=reporter,
    )
    reporter("loading the model", 1, 1, {})
    return parts


def _finish(
    trainer: SubjectTrainer,
    settings: JobSettings,
    subject: Subject,
    model: ModelFacts,
    report: dict[str, Any] | None,
    run: RunLog,
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
    plot_recorded(folder, target.stem)
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
