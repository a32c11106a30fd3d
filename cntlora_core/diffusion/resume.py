"""Whether a run that is to go on is the run that was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cntlora_core.diffusion.state import TrainingState

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
    ("job", "training", "device"),
}


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
