"""Whether a run that is to go on is the run that was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.diffusion.state import TrainingState

_MAY_CHANGE = {
    ("output",),
    ("prior", "cache"),
    ("subject", "images"),
    ("model",),
    ("training", "save_every"),
    ("training", "sample_prompts"),
    ("training", "sample_every"),
    ("training", "device"),
}


def check_same_run(state: TrainingState, settings: JobSettings, identity: dict[str, Any]) -> None:
    """A resumed run is the same run: whatever shapes its result must not have changed.

    Raises:
        ValueError: naming every setting, photo or model that differs.
    """
    ours = {"job": settings.to_dict(), "identity": identity}
    may_change = set(_MAY_CHANGE)
    if settings.training.lr_schedule.startswith("constant"):
        may_change.add(("training", "steps"))
    differing = [
        ".".join(path)
        for path, old, new in _differences(
            {k: state.settings.get(k, {}) for k in ours}, _plain(ours)
        )
        if not any(path[1 : 1 + len(free)] == free for free in may_change)
    ]
    if differing:
        raise ValueError(
            f"the state was left by another run; these differ: {', '.join(differing)}. Resume with "
            "the settings and photos of that run, or start anew with --overwrite"
        )


def _differences(
    old: Any, new: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), (*path, key))
    elif old != new:
        yield path, old, new


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
