"""Overwriting: nothing of the earlier run passes for the new one's, and nothing goes too early."""

from __future__ import annotations

from pathlib import Path

import pytest

from cntlora_core.diffusion.job import STATE_NAME, personalise
from cntlora_core.diffusion.run_folder import clear_folder
from cntlora_core.diffusion.run_identity import RECORD_NAME, finished_run
from cntlora_core.diffusion.snapshots import loras_of_run, snapshots_in

from ..conftest import StopAt, change


@pytest.fixture
def earlier(plain):
    """A finished run of three steps with a preview, a snapshot, a comparison and a file of mine."""
    settings = change(plain, "training", sample_prompts=("a dog",), sample_steps=1)
    settings = change(settings, "output", save_lora_every=2, name="before")
    result = personalise(settings)
    (result.folder / "notes.txt").write_text("mine")
    (result.folder / "samples" / "mine.png").touch()
    logs = result.folder / "logs" / "before"  # as accelerate has TensorBoard write them
    (logs / "17.5").mkdir(parents=True)
    left = ("events.out.tfevents.17.host", "17.5/hparams.yml", "17.5/events.out.tfevents.17.host")
    for path in (*(logs / name for name in left), result.folder / "compare.jpg"):
        path.touch()
    (result.folder / "compare.json").touch()
    return result


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_nothing_of_an_overwritten_run_is_taken_for_the_new_one_s(earlier, plain):
    anew = change(change(plain, "output", save_lora_every=1), "adapter", method="eva")
    with pytest.raises(KeyboardInterrupt):
        personalise(anew, overwrite=True, reporter=StopAt(2))
    folder = earlier.folder
    assert finished_run(folder) is None
    with pytest.raises(ValueError, match="holds no finished run"):
        loras_of_run(folder)
    assert set(content(folder)) == {
        "notes.txt",
        "samples/mine.png",
        "photos.jpg",
        STATE_NAME,
        *(s.path.relative_to(folder).as_posix() for s in snapshots_in(folder)),
    }
    assert [s.step for s in snapshots_in(folder)] == [1, 2]
    assert all(s.path.name.startswith("sks-dog-eva") for s in snapshots_in(folder))
    with pytest.raises(FileExistsError, match="interrupted run"):
        personalise(anew)


class StopIn:
    """A reporter that raises in a stage."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __call__(self, stage: str, *_: object) -> None:
        if stage.startswith(self.stage):
            raise KeyboardInterrupt


def test_an_overwriting_that_does_not_come_to_train_leaves_the_earlier_run(
    earlier, plain, tmp_path
):
    before = content(earlier.folder)
    anew = change(plain, "adapter", method="cross")
    for stage in ("loading the model", "encoding photos", "solving for the initialisation"):
        with pytest.raises(KeyboardInterrupt):
            personalise(anew, overwrite=True, reporter=StopIn(stage))
    empty = tmp_path / "no photos"
    empty.mkdir()
    with pytest.raises(ValueError, match="no usable picture"):
        personalise(change(plain, "subject", images=str(empty)), overwrite=True)
    with pytest.raises(ValueError, match="rank"):
        personalise(change(plain, "adapter", method="cross", rank=10_000), overwrite=True)
    for inside in ("", "before.safetensors", "snapshots/before-step-000002.safetensors"):
        given = {"method": "cross", "from_lora": str(earlier.folder / inside), "alpha": None}
        with pytest.raises(ValueError, match="choose another output folder"):
            personalise(change(plain, "adapter", **given), overwrite=True)
    assert content(earlier.folder) == before


def test_a_record_that_names_no_file_of_the_folder_removes_nothing_else(earlier, plain):
    record = earlier.folder / RECORD_NAME
    text = record.read_text("utf-8")
    for name in ("", ".", "..", "../my photos", "samples/mine.png"):
        record.write_text(text.replace('"before.safetensors"', f'"{name}"'))
        assert finished_run(earlier.folder) is None
    clear_folder(earlier.folder)
    kept = content(earlier.folder)
    assert set(kept) == {"before.safetensors", "notes.txt", "samples/mine.png"}
    assert Path(plain.subject.images).is_dir()
