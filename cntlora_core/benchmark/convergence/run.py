"""One run of a grid: initialised, trained, measured on the way, and written down at its end."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cntlora_core import __version__, mini
from cntlora_core.benchmark.convergence.controls import controlled
from cntlora_core.benchmark.convergence.grid import Bench, Run
from cntlora_core.benchmark.convergence.measure import Measurements, measured_by
from cntlora_core.benchmark.convergence.subjects import BenchSubject, bench_subject
from cntlora_core.benchmark.initialization_speed import machine
from cntlora_core.benchmark.peak import peak_bytes, reset_peak
from cntlora_core.data.latents import encode_latents
from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
from cntlora_core.diffusion.prior import class_images
from cntlora_core.diffusion.run_identity import ALGORITHM, STATE_NAME
from cntlora_core.diffusion.sampler import checked_device
from cntlora_core.diffusion.stages import (
    encode_class_images,
    encode_subject,
    plan_initialization,
    training_data,
    training_resolution,
)
from cntlora_core.diffusion.state import TrainingState
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.runtime.files import (
    atomic_write,
    folder_within,
    require_writable_folder,
    write_json_atomic,
)
from cntlora_core.runtime.memory import freed_memory_kept
from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.threads import threads, threads_for

RUNS_NAME, RECORD_NAME, PART_NAME, FAILURE_NAME = "runs", "run.json", "part.json", "failed.json"
SHEET_SIDE = 128
"""Largest side in pixels of an image in a sheet."""


@dataclass(frozen=True)
class Task:
    """A run, and where it is kept.

    Attributes:
        folder: Output folder of the grid.
        key: Hash of all that determines the run, its folder's name.
        run: Its settings.
        bench: What all runs share.
        class_prompt: The prompt of its class images.
    """

    folder: Path
    key: str
    run: Run
    bench: Bench
    class_prompt: str

    @property
    def place(self) -> Path:
        """The folder of this run."""
        return self.folder / RUNS_NAME / self.key


def run_key(run: Run, bench: Bench, subject: dict[str, Any], model: str) -> str:
    """16 hex digits over all that determines a run and its measurements, by content: no paths.

    Args:
        run: The run.
        bench: What all runs share.
        subject: Identity of its subject, as :meth:`BenchSubject.identity` gives it.
        model: Fingerprint of the model.
    """
    measure = dataclasses.asdict(bench.measure) | {"encoders": measured_by(bench)}
    content = {
        "algorithm": ALGORITHM,
        "model": model,
        "subject": subject,
        "settings": {k: v for k, v in run.values().items() if k not in ("subject", "photos")},
        "measure": {k: v for k, v in measure.items() if k not in ("dino", "clip", "batch_size")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class _Clock:
    """Seconds by stage, on the wall and of the processor, and what a run had used before."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - wall, time.process_time() - cpu)

    def add(self, stage: str, wall: float, cpu: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + wall
        self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + cpu


def prepare(task: Task, reporter: Reporter = silent) -> None:
    """Generate the class images of a run, and encode them, into the cache that all runs share."""
    parts = _load(task.bench, task.run)
    subject = bench_subject(task.bench, task.run)
    photos = _class_photos(parts, task, subject, reporter)
    encode_class_images(parts, subject.subject, photos, cache=_cache(task), reporter=reporter)


def execute(task: Task, reporter: Reporter = silent) -> None:
    """Do one run, or the rest of one that was begun, and write its ``run.json``.

    Raises:
        ValueError, OSError: for settings, photos or a model that cannot be used.
        NonFiniteLossError: if the training blows up.
    """
    folder = folder_within(task.folder, RUNS_NAME, task.key)
    reset_peak()
    with torch.inference_mode(False):
        _execute(task, folder, reporter)
    for name in (STATE_NAME, PART_NAME, FAILURE_NAME):
        (folder / name).unlink(missing_ok=True)


def _execute(task: Task, folder: Path, reporter: Reporter) -> None:
    run, bench, clock = task.run, task.bench, _Clock()
    device = checked_device(bench.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with clock.timed("loading"):
        parts = _load(bench, run)
        subject = bench_subject(bench, run)
    count, source, fingerprint = threads_for(parts.unet), parts.source, parts.fingerprint
    with clock.timed("encoding"):
        encoded = encode_subject(parts, subject.subject, cache=_cache(task))
        photos = _class_photos(parts, task, subject, reporter)
        others = encode_class_images(parts, subject.subject, photos, cache=_cache(task))
        held_out = None
        if subject.held_out is not None:
            held_out = encode_latents(
                subject.held_out,
                parts.vae,
                resolution=training_resolution(parts, subject.subject.settings),
                cache_dir=folder_within(_cache(task), "latents"),
                vae_fingerprint=fingerprint,
            )
    with clock.timed("measuring"), threads(count):
        measurements = Measurements(parts, subject, held_out, others.latents, bench)
    state, part = begun(folder, task) or (None, {})
    if state is None:
        with clock.timed("initialization"):
            initialization = plan_initialization(
                parts, encoded, run.adapter, seed=run.training.seed, reporter=reporter
            )
            if run.control:
                initialization = controlled(initialization, run.method, run.training.seed)
        plan = initialization.plan
        part = {
            "rows": [],
            "initialization": initialization.report and initialization.report.to_dict(),
        }
        del initialization
    else:
        plan = state.plan
    scheduler, networks, family = parts.noise_scheduler, parts.networks, parts.family
    del parts
    trainer = SubjectTrainer(
        networks,
        family,
        scheduler,
        plan,
        training_data(encoded, others if run.prior.prior_weight > 0 else None),
        adapter=run.adapter,
        training=dataclasses.replace(
            run.training, save_every=bench.save_every, device=bench.device
        ),
        prior_weight=run.prior.prior_weight,
        settings={"key": task.key},
    )
    if state is not None:
        trainer.restore(state)
        part["continued"] = [*part.get("continued", []), state.step]
        for stage, seconds in part["seconds"].items():
            clock.add(stage, seconds, part["cpu_seconds"][stage])
        del state
    total, at = run.training.steps, bench.measure.at(run.training.steps)
    before = time.process_time()

    def after_step(step: int) -> None:
        nonlocal before
        if step not in at:
            return
        clock.add("training", 0.0, time.process_time() - before)
        row: dict[str, Any] = {"step": step}
        with clock.timed("measuring"):
            row |= measurements.loss_and_drift()
        if bench.measure.has_pictures(step, total):
            with clock.timed("images"):
                values, images = measurements.images()
                row |= values | {"sheet": _save_sheet(folder, step, images, bench)}
        if not all(math.isfinite(v) for v in row.values() if isinstance(v, float)):
            raise FloatingPointError(f"what is measured after step {step} is not finite: {row}")
        part["rows"].append(row)
        peak = max(part.get("peak_bytes", 0), _peak(device))
        part.update(seconds=clock.seconds, cpu_seconds=clock.cpu_seconds, peak_bytes=peak)
        write_json_atomic(folder / PART_NAME, part)
        before = time.process_time()

    with threads(count), freed_memory_kept(device.type == "cpu"):
        if trainer.step not in [row["step"] for row in part["rows"]]:
            after_step(trainer.step)
        trainer.run(reporter=reporter, state_path=folder / STATE_NAME, after_step=after_step)
    clock.seconds["training"] = sum(record["seconds"] for record in trainer.history)
    record = {
        "key": task.key,
        "settings": run.values(),
        "model": {"source": Path(source).name, "fingerprint": fingerprint},
        "subject": subject.identity(),
        "measure": dataclasses.asdict(bench.measure) | {"encoders": measured_by(bench)},
        "trained_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "ranks": {name: factors.rank for name, factors in plan.factors.items()},
        "initialization": part["initialization"],
        "rows": part["rows"],
        "training_loss": [round(record["loss"], 6) for record in trainer.history],
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "peak_bytes": part["peak_bytes"],
        "continued_after": part.get("continued", []),
        "machine": machine() | {"threads": count, "device": device.type, "cntlora": __version__},
        "revision": _revision(),
    }
    write_json_atomic(folder / RECORD_NAME, record)


def begun(folder: Path, task: Task) -> tuple[TrainingState, dict[str, Any]] | None:
    """State and measurements of a run in its folder, if it was begun and both are whole."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        part = json.loads((folder / PART_NAME).read_text("utf-8"))
        state = TrainingState.load(folder / STATE_NAME)
        part["rows"] = [row for row in part["rows"] if row["step"] <= state.step]
        found = [row["step"] for row in part["rows"]]
        wanted = [s for s in task.bench.measure.at(task.run.training.steps) if s <= state.step]
        # A state may have been saved because a measurement after its step was cut short.
        whole = found in (wanted, [step for step in wanted if step < state.step])
        if whole and state.settings["key"] == task.key:
            return state, part
    return None


def _load(bench: Bench, run: Run) -> StableDiffusionParts:
    model = mini.model_path() if bench.small else bench.model
    device = checked_device(bench.device)
    return load_stable_diffusion(model, dtype=run.training.dtype, device=device)


def _class_photos(
    parts: StableDiffusionParts, task: Task, subject: BenchSubject, reporter: Reporter
) -> Any:
    return class_images(
        parts,
        subject.subject.prompts.class_prompt,
        dataclasses.replace(task.run.prior, cache=str(_cache(task))),
        resolution=training_resolution(parts, subject.subject.settings),
        reporter=reporter,
    )


def _cache(task: Task) -> Path:
    if task.bench.cache is not None:
        return require_writable_folder(task.bench.cache)
    return folder_within(task.folder, "cache")


def _save_sheet(folder: Path, step: int, images: list[Image.Image], bench: Bench) -> str:
    """One row for each prompt; returns the file's name."""
    side = min(SHEET_SIDE, images[0].width)
    columns = bench.measure.per_prompt
    sheet = Image.new("RGB", (columns * side, len(images) // columns * side), "white")
    for i, image in enumerate(images):
        small = image.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % columns * side, i // columns * side))
    name = f"step-{step:06d}.jpg"
    with atomic_write(folder / name) as temporary:
        sheet.save(temporary, format="JPEG", quality=90)
    return name


def _peak(device: torch.device) -> int:
    """Bytes: of the device's memory where it has its own, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()


@functools.lru_cache(maxsize=1)
def _revision() -> str | None:
    """The commit of the source, and whether it was changed since; None outside a repository."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
