"""What lies where in the output folder of a run, and whether a run may begin there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cntlora_core.diffusion.run_identity import RECORD_NAME, STATE_NAME, finished_run, steps_in
from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.diffusion.snapshots import SNAPSHOTS_NAME, remove_snapshots
from cntlora_core.diffusion.stages import Subject
from cntlora_core.dynamics.log import FILE_NAME
from cntlora_core.lora_file.names import COMPONENTS
from cntlora_core.runtime.file_names import distinct_names, safe_name
from cntlora_core.runtime.files import path_within, remove
from cntlora_core.runtime.reading import user_path

LOSS_NAME, RANKS_NAME, SAMPLES_NAME = "loss.png", "ranks.png", "samples"
PHOTOS_NAME = "photos.jpg"
DYNAMICS_NAME, DYNAMICS_PLOT = FILE_NAME, "dynamics.png"
LOGS_NAME, COMPARISON_NAME = "logs", "compare.jpg"
_INSIDE = (
    (SAMPLES_NAME, "[0-9]*-*.png"),
    (LOGS_NAME, "**/events.out.tfevents.*"),
    (LOGS_NAME, "**/hparams.yml"),
)
_PICTURES = (LOSS_NAME, RANKS_NAME, PHOTOS_NAME, DYNAMICS_NAME, DYNAMICS_PLOT, COMPARISON_NAME)


def lora_path(folder: Path, settings: JobSettings, subject: Subject) -> Path:
    """Where the LoRA goes: a file, or in peft's layout a folder.

    Raises:
        ValueError: if another file of the run has that name, or a folder is where the file belongs.
        OSError: if peft's folder, or one in it, is a symbolic link.
    """
    prompts, output = subject.prompts, settings.output
    name = output.name or "-".join(
        filter(None, [prompts.token, prompts.class_name, settings.adapter.method])
    )
    stem = safe_name(name)
    target = folder / (stem if output.layout == "peft" else f"{stem}.safetensors")
    own = (STATE_NAME, RECORD_NAME, *_PICTURES, SAMPLES_NAME, SNAPSHOTS_NAME, LOGS_NAME)
    if target.name.casefold() in own:
        raise ValueError(
            f"the name {name!r} would put the LoRA at {target}, where the run keeps a file of its "
            "own: choose another --name"
        )
    if output.layout == "peft":
        for part in COMPONENTS:
            path_within(folder, target.name, part)
    elif target.is_dir():
        raise ValueError(f"{target} is a folder: choose another --name for the LoRA file")
    return target


def sample_names(step: int, prompts: Sequence[str]) -> list[str]:
    """Names of the files of the images that are generated after a step, one for each prompt."""
    return [f"{step:06d}-{name}.png" for name in distinct_names(prompts)]


def clear_folder(folder: Path) -> None:
    """Remove what an earlier run left: nothing of it may pass for a part of the run that begins.

    Files of other names stay, LoRAs that the earlier run was written to under another name among
    them.
    """
    earlier = finished_run(folder)
    (folder / RECORD_NAME).unlink(missing_ok=True)  # first: it is what makes a run a finished one
    if earlier is not None:
        remove(earlier.lora)
    remove_snapshots(folder)
    for name, pattern in _INSIDE:
        inner = folder / name
        for path in () if inner.is_symlink() else inner.glob(pattern):
            path.unlink(missing_ok=True)
    for name in (*_PICTURES, Path(COMPARISON_NAME).with_suffix(".json").name):
        (folder / name).unlink(missing_ok=True)
    (folder / STATE_NAME).unlink(missing_ok=True)  # last: until then the earlier run can go on


def check_folder(folder: Path, resume: bool, overwrite: bool, from_lora: str | None = None) -> None:
    """Refuse to begin a run in a folder that holds one, unless it was said what becomes of that.

    Args:
        folder: The output folder.
        resume: The run in it is gone on with.
        overwrite: It is removed.
        from_lora: The LoRA that the new run goes on from.

    Raises:
        FileExistsError: with what there is, and what to say.
        ValueError: if overwriting would remove the LoRA that the run goes on from.
    """
    if resume:
        return
    if overwrite:
        if from_lora and user_path(from_lora).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"overwriting {folder} would remove the LoRA to go on from, {from_lora}: choose "
                "another output folder"
            )
        return
    has_state, found = (folder / STATE_NAME).exists(), finished_run(folder)
    if has_state and (found is None or len(found.history) != steps_in(folder)):
        raise FileExistsError(
            f"{folder} holds the state of an interrupted run: go on with --resume, or start anew "
            "with --overwrite"
        )
    if has_state and found is not None:
        raise FileExistsError(
            f"{folder} holds a finished run of {len(found.history)} steps: with --resume it is "
            "written to another file or, if its learning rate is constant, goes on to more "
            "--steps; choose another output folder, or start anew with --overwrite"
        )
    if (folder / RECORD_NAME).exists():
        raise FileExistsError(
            f"{folder} holds a finished run, whose state was not kept: choose another output "
            "folder, or start anew with --overwrite"
        )
