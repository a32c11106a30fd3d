"""What makes a run the run that it is: to go on with an interrupted one, to find a finished one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cntlora_core.diffusion.state import TrainingState

if TYPE_CHECKING:
    from cntlora_core.data.photos import PhotoSet
    from cntlora_core.diffusion.settings import JobSettings
    from cntlora_core.diffusion.stages import Subject

_MAY_CHANGE = {
    ("job", "output"),
    ("job", "prior", "cache"),
    ("job", "prior", "class_images"),
    ("job", "subject", "images"),
    ("job", "model"),
    ("job", "adapter", "init_minutes"),
    ("job", "training", "save_every"),
    ("job", "training", "sample_prompts"),
    ("job", "training", "sample_every"),
    ("job", "training", "sample_steps"),
    ("job", "training", "device"),
}


def run_identity(
    model: str, subject: Subject, class_photos: PhotoSet | None, start_seed: int
) -> dict[str, Any]:
    """What a run works on, by content and not by place, as JSON values.

    Args:
        model: Fingerprint of the model.
        subject: Photos and prompts.
        class_photos: Class images, or None.
        start_seed: Seed of the adapter's start.
    """
    identity = {"model": model, **subject.identity(), "start_seed": start_seed}
    if class_photos is not None:
        photos, recipe = class_photos.photos, class_photos.recipe
        # Generated ones may have to be generated again, where rounding gives other pixels.
        identity["class_images"] = (
            {"number": len(photos), "recipe": recipe} if recipe else [p.digest for p in photos]
        )
    return identity


def run_key(settings: JobSettings, identity: dict[str, Any]) -> str:
    """16 hex digits that two runs share if they lead to the same file."""
    output = settings.output
    content = {
        "run": [
            [".".join(path), value]
            for path, value in _leaves(_plain({"job": settings.to_dict(), "identity": identity}))
            if not any(path[: len(free)] == free for free in _MAY_CHANGE)
        ],
        "file": [output.layout, output.file_precision, output.compress],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class FinishedRun:
    """What a run that ended well left in its folder.

    Attributes:
        lora: The LoRA file (a folder in peft's layout).
        history: One record per step.
        notes: What a person was told.
    """

    lora: Path
    history: list[dict[str, float]]
    notes: tuple[str, ...]


def finished_run(folder: Path, record_name: str = "run.json") -> FinishedRun | None:
    """What a finished run left in this folder; None if there is no whole one."""
    try:
        record = json.loads((folder / record_name).read_text("utf-8"))
        lora = folder / record["export"]["file"]
        found = FinishedRun(lora, record["history"], tuple(record["notes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if lora.exists() else None


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
        ValueError: naming every setting, photo or model that differs.
    """
    may_change = set(_MAY_CHANGE)
    if str(_at(given, "job", "training", "lr_schedule")).startswith("constant"):
        may_change.add(("job", "training", "steps"))
    old = {key: state.settings.get(key, {}) for key in given}
    differing = [
        ".".join(path)
        for path in _differences(old, _plain(given))
        if not any(path[: len(free)] == free for free in may_change)
    ]
    if differing:
        raise ValueError(
            f"the state was left by another run; these differ: {', '.join(differing)}. Resume with "
            "the settings and photos of that run, or start anew with --overwrite"
        )


def _at(values: Any, *path: str) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), (*path, key))
    elif old != new:
        yield path


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
