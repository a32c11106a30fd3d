"""The LoRA files that a run keeps on the way: named by their step, listed, and picked from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cntlora_core.diffusion.run_identity import RECORD_NAME, finished_run
from cntlora_core.diffusion.run_lock import only_run_in
from cntlora_core.runtime.files import (
    atomic_write,
    folder_within,
    path_within,
    remove,
    write_json_atomic,
)
from cntlora_core.runtime.reading import read_json_object

SNAPSHOTS_NAME = "snapshots"
SUFFIX = ".safetensors"
_NAME = re.compile(rf"(?P<stem>.+)-step-(?P<step>[0-9]{{6,}})({re.escape(SUFFIX)})?")


@dataclass(frozen=True, order=True)
class Snapshot:
    """A LoRA of a run as it was after some step.

    Attributes:
        step: Optimizer steps done.
        path: The file (a folder in peft's layout).
    """

    step: int
    path: Path


def snapshots_in(folder: str | Path) -> list[Snapshot]:
    """What a run has kept on the way, one for each step, by step."""
    kept = path_within(Path(folder), SNAPSHOTS_NAME)
    named = ((path, _NAME.fullmatch(path.name)) for path in sorted(kept.glob("*-step-*")))
    found = {int(name["step"]): path for path, name in named if name and path.name[0] != "."}
    return [Snapshot(step, found[step]) for step in sorted(found)]


def write_snapshot(
    folder: Path, target: Path, step: int, write: Callable[[Path], object]
) -> Snapshot:
    """Keep the LoRA of a step; at any moment there is a whole one or none.

    Args:
        folder: Of the run.
        target: Where the LoRA of its last step will go.
        step: Steps done.
        write: Writes a LoRA file, or a folder in peft's layout, to the path that it is given.
    """
    path = _place(folder, target, step)
    if path.suffix == SUFFIX:
        write(path)  # as a whole, like every file of this package
    else:
        with _whole_folder(path) as temporary:
            write(temporary)
    return Snapshot(step, path)


def remove_snapshots(folder: Path) -> None:
    """Remove the snapshots of a run that is not gone on with."""
    for snapshot in snapshots_in(folder):
        remove(snapshot.path)


def keep_own_lora(folder: Path) -> Snapshot | None:
    """Keep the LoRA of a finished run among its snapshots.

    Returns:
        The new snapshot; None if there was one of that step, or no finished run.
    """
    found = finished_run(folder)
    if found is None or found.step in {kept.step for kept in snapshots_in(folder)}:
        return None
    path = _place(folder, found.lora, found.step)
    _copy(found.lora, path)
    return Snapshot(found.step, path)


def loras_of_run(folder: str | Path) -> list[Snapshot]:
    """The LoRAs of a finished run, by step: its snapshots, and the one that is the run's own.

    Raises:
        ValueError: if the folder holds no finished run.
    """
    folder = Path(folder)
    own = _own_lora(folder)
    return sorted([*(s for s in snapshots_in(folder) if s.step != own.step), own])


def pick_snapshot(folder: str | Path, step: int) -> Path:
    """Make the LoRA of a step the run's own, which a path to the run's folder then stands for.

    The LoRA is copied into the run's folder, under a name with its step; the one that was there is
    kept among the snapshots. The record of the run is what decides, and is replaced as a whole: at
    any moment it names a whole file.

    Returns:
        The file (a folder in peft's layout).

    Raises:
        ValueError: if the folder holds no finished run, or the run has kept no LoRA of that step.
        BlockingIOError: if a run is at work in the folder.
    """
    from cntlora_core.lora_file.contents import read_contents

    folder = Path(folder)
    own = _own_lora(folder)
    with only_run_in(folder):
        steps = {snapshot.step: snapshot.path for snapshot in loras_of_run(folder)}
        if step not in steps:
            hint = ": train with --save-lora-every to keep more" if len(steps) == 1 else ""
            raise ValueError(
                f"{folder} keeps no LoRA of step {step}; there are those of the steps "
                f"{', '.join(map(str, steps))}{hint}"
            )
        if step == own.step:
            return own.path
        keep_own_lora(folder)
        path = path_within(folder, steps[step].name)
        _copy(steps[step], path)
        record = read_json_object(folder / RECORD_NAME)
        record["export"] |= {
            "file": path.name,
            "step": step,
            "ranks": {name: layer.rank for name, layer in read_contents(path).layers.items()},
            "relative_error": None,
            "truncation_error": None,
        }
        record["snapshots"] = records_of(folder)
        write_json_atomic(folder / RECORD_NAME, record)
        remove(own.path)
    return path


def records_of(folder: Path) -> list[dict[str, object]]:
    """The snapshots of a run for its record: step, and file within the run's folder."""
    return [
        {"step": snapshot.step, "file": snapshot.path.relative_to(folder).as_posix()}
        for snapshot in snapshots_in(folder)
    ]


def _own_lora(folder: Path) -> Snapshot:
    found = finished_run(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds no finished run: give the output folder of `cntlora train`; a run "
            "that was interrupted goes on with --resume, and its snapshots are files like any LoRA"
        )
    return Snapshot(found.step, found.lora)


def _place(folder: Path, lora: Path, step: int) -> Path:
    """Where the snapshot of a step belongs, by the name of the run's own LoRA."""
    suffix = SUFFIX if lora.name.endswith(SUFFIX) else ""
    stem = lora.name.removesuffix(suffix)
    match = _NAME.fullmatch(stem)
    stem = match["stem"] if match else stem
    return folder_within(folder, SNAPSHOTS_NAME) / f"{stem}-step-{step:06d}{suffix}"


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")  # a run is alone in its folder
    remove(temporary)
    try:
        yield temporary
        remove(path)
        temporary.replace(path)
    finally:
        remove(temporary)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        with _whole_folder(target) as temporary:
            shutil.copytree(source, temporary)
    else:
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
