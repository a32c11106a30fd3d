"""What makes a run the run that it is: to go on with an interrupted one, to find a finished one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cntlora_core.diffusion.state import TrainingState, steps_done

if TYPE_CHECKING:
    from cntlora_core.data.photos import PhotoSet
    from cntlora_core.diffusion.settings import JobSettings, OutputSettings
    from cntlora_core.diffusion.stages import Subject

ALGORITHM = 2
"""Version of what a run computes. Raise it with every change after which the same settings, photos
and model lead to other numbers: runs of before are then neither reused nor gone on with."""

STATE_NAME = "state.safetensors"
RECORD_NAME = "run.json"

_STEPS, _RANK = ("job", "training", "steps"), ("job", "adapter", "rank")
_MAY_CHANGE = {
    ("job", "output"),
    ("job", "prior", "cache"),
    ("job", "prior", "class_images"),
    ("job", "subject", "images"),
    ("job", "subject", "held_out"),
    ("job", "training", "held_out_every"),
    ("job", "training", "log_with"),
    ("job", "training", "dynamics_every"),
    ("job", "model"),
    ("job", "prediction_type"),  # the model's fingerprint says it
    ("job", "adapter", "init_minutes"),
    ("job", "adapter", "from_lora"),
    ("job", "training", "save_every"),
    ("job", "training", "sample_prompts"),
    ("job", "training", "sample_every"),
    ("job", "training", "sample_steps"),
    ("job", "training", "device"),
    ("job", "training", "gradient_checkpointing"),  # computes the same numbers twice
}


def run_identity(
    model: str,
    subject: Subject,
    class_photos: PhotoSet | None,
    init_seed: int,
    from_lora: str | None = None,
) -> dict[str, Any]:
    """What a run works on, by content and not by place, as JSON values.

    Args:
        model: Fingerprint of the model.
        subject: Photos and prompts.
        class_photos: Class images, or None.
        init_seed: Seed of the adapter's initialisation.
        from_lora: Fingerprint of the LoRA that the run goes on from, if any.
    """
    identity = {
        "algorithm": ALGORITHM,
        "model": model,
        **subject.identity(),
        "start_seed": init_seed,
    }
    if from_lora is not None:
        identity["from_lora"] = from_lora
    if class_photos is not None:
        photos, recipe = class_photos.photos, class_photos.recipe
        # Generated ones may have to be generated again, where rounding gives other pixels.
        identity["class_images"] = (
            {"number": len(photos), "recipe": recipe} if recipe else [p.digest for p in photos]
        )
    return identity


def run_key(settings: JobSettings, identity: dict[str, Any]) -> str:
    """16 hex digits that two runs share if one can go on where the other stopped.

    What names, exports or saves memory is not part of it, nor is the number of steps, unless the
    course of the learning rate depends on it, nor the rank where a LoRA gives it.
    """
    free = _free_settings(settings.training.lr_schedule, settings.adapter.from_lora)
    content = [
        [".".join(path), value]
        for path, value in _leaves(_plain({"job": settings.to_dict(), "identity": identity}))
        if not _is_in(path, free)
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _free_settings(schedule: str, from_lora: object) -> set[tuple[str, ...]]:
    free = {_STEPS} if schedule.startswith("constant") else set()
    return _MAY_CHANGE | free | ({_RANK} if from_lora is not None else set())


def _is_in(path: tuple[str, ...], free: set[tuple[str, ...]]) -> bool:
    return any(path[: len(part)] == part for part in free)


@dataclass(frozen=True)
class FinishedRun:
    """What a run that ended well left in its folder.

    Attributes:
        lora: The LoRA file (a folder in peft's layout).
        history: One record per step.
        notes: What a person was told.
        output: Settings of the file, as JSON values.
        step: The step whose LoRA it is: the last one, unless another was picked.
    """

    lora: Path
    history: list[dict[str, float]]
    notes: tuple[str, ...]
    output: dict[str, Any]
    step: int

    def is_what(self, steps: int, output: OutputSettings) -> bool:
        """Whether this is the run of so many steps, with its file as these settings have it."""
        asked = dataclasses.asdict(output)
        shaping = asked.keys() - {"output", "keep_state", "save_lora_every"}
        return len(self.history) == steps and all(
            self.output.get(name) == asked[name] for name in shaping
        )


def finished_run(folder: Path) -> FinishedRun | None:
    """What a finished run left in this folder; None if there is no whole one."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text("utf-8"))
        export, history = record["export"], record["history"]
        found = FinishedRun(
            lora=folder / export["file"],
            history=history,
            notes=tuple(record["notes"]),
            output=dict(record["settings"]["output"]),
            step=int(export.get("step", len(history))),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    within = found.lora.name == export["file"] not in ("", "..")
    return found if within and found.lora.exists() else None


def steps_in(folder: Path) -> int:
    """The steps of the run in this folder, finished or not; 0 without one.

    A state that is damaged counts for nothing: whoever goes on from it is told.
    """
    found = finished_run(folder)
    finished = 0 if found is None else len(found.history)
    try:
        return max(finished, steps_done(folder / STATE_NAME))
    except (OSError, ValueError):
        return finished


def _leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(values, dict):
        yield path, values
        return
    for key in sorted(values):
        yield from _leaves(values[key], (*path, key))


def check_same_run(state: TrainingState, given: dict[str, Any]) -> None:
    """A resumed run is the same run: whatever shapes its result must not have changed.

    Folders may have moved: photos, class images and model are compared by their content.

    Args:
        state: What the interrupted run left.
        given: ``job``, the settings as JSON values, or ``identity``, what photos, class images,
            prompts and model are, or both.

    Raises:
        ValueError: naming every setting, photo or model that differs; if more steps are asked for
            where the learning rate depends on their number, or fewer than were done.
    """
    schedule = str(_at(given, "job", "training", "lr_schedule"))
    free = _free_settings(schedule, _at(given, "job", "adapter", "from_lora"))
    old = {key: state.settings.get(key, {}) for key in given}
    differing = [path for path in _differences(old, _plain(given)) if not _is_in(path, free)]
    if differing == [_STEPS]:
        raise ValueError(
            f"a run of {_at(old, *_STEPS)} steps cannot become one of {_at(given, *_STEPS)}: with "
            f"lr_schedule={schedule!r} the learning rate of each step depends on their number. Ask "
            "for as many, or start anew with --overwrite"
        )
    if differing:
        names = ", ".join(map(".".join, differing))
        raise ValueError(
            f"the state was left by another run; these differ: {names}. Resume with "
            "the settings and photos of that run, or start anew with --overwrite"
        )
    steps = _at(given, *_STEPS)
    if steps is not None and steps < state.step:
        raise ValueError(
            f"the run has done {state.step} steps, more than the {steps} that were asked for: ask "
            "for as many or more, choose another output folder, or start anew with --overwrite"
        )


def _at(values: Any, *path: str) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if key not in old and not new[key]:
                continue  # a setting that there was not then, and that is off
            yield from _differences(old.get(key), new.get(key), (*path, key))
    elif old != new:
        yield path


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
