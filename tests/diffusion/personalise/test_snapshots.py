"""LoRAs kept on the way: what they hold, what they leave as it was, and picking one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cntlora_core.cli import main
from cntlora_core.diffusion import job, snapshots
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.sampler import LoRAUse
from cntlora_core.diffusion.snapshots import loras_of_run, pick_snapshot, snapshots_in
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.inspection.inspect import inspect_lora
from cntlora_core.lora_file.reading import read_lora_file

from ..conftest import StopAt, change, losses


def same_lora(first: Path, second: Path) -> bool:
    if first.is_dir():
        one, two = read_lora_file(first).layers, read_lora_file(second).layers
        return one.keys() == two.keys() and all(
            torch.equal(one[n].down, two[n].down) and torch.equal(one[n].up, two[n].up) for n in one
        )
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def steps_kept(folder: Path) -> list[int]:
    return [snapshot.step for snapshot in snapshots_in(folder)]


def test_a_snapshot_is_the_lora_of_a_run_of_its_steps_and_changes_no_training(plain, tmp_path):
    plain = change(plain, "adapter", method="cross", init_passes=1)
    whole = personalise(plain)
    kept = personalise(change(plain, "output", output=str(tmp_path / "kept"), save_lora_every=2))
    assert losses(kept) == losses(whole)
    assert same_lora(kept.lora, whole.lora)
    assert steps_kept(kept.folder) == [2]
    short = change(plain, "training", steps=2)
    short = personalise(change(short, "output", output=str(tmp_path / "short")))
    snapshot = kept.snapshots[0].path
    assert snapshot.name == f"{kept.lora.stem}-step-000002.safetensors"
    assert same_lora(snapshot, short.lora)
    with safe_open(snapshot, "pt") as one, safe_open(short.lora, "pt") as other:
        assert one.metadata()["ss_steps"] == other.metadata()["ss_steps"] == "2"
        assert one.metadata().keys() == other.metadata().keys()
    record = json.loads((kept.folder / "run.json").read_text("utf-8"))
    assert record["snapshots"] == [{"step": 2, "file": f"snapshots/{snapshot.name}"}]
    assert record["export"]["step"] == 3


@pytest.mark.thorough
def test_snapshots_of_lava_change_no_training(plain, tmp_path):
    plain = change(plain, "adapter", adapter="lava", convolutions=False, orthogonality=0.0)
    whole = personalise(change(plain, "training", steps=2))
    longer = change(plain, "output", output=str(tmp_path / "kept"), save_lora_every=2)
    kept = personalise(longer)
    assert losses(kept)[:2] == losses(whole)
    assert same_lora(kept.snapshots[0].path, whole.lora)
    assert not same_lora(kept.lora, whole.lora)


@pytest.mark.thorough
def test_an_interrupted_and_a_lengthened_run_keep_every_snapshot(plain, monkeypatch):
    keeping = change(plain, "output", save_lora_every=1, layout="peft")
    write = job.export_lora

    def cancel(*arguments, **options):
        write(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("cntlora_core.diffusion.job.export_lora", cancel)
    with pytest.raises(KeyboardInterrupt):  # while the first snapshot was written
        personalise(keeping)
    assert steps_kept(Path(keeping.output.output)) == []
    monkeypatch.setattr("cntlora_core.diffusion.job.export_lora", write)
    first = personalise(keeping, resume=True)
    assert steps_kept(first.folder) == [1, 2]
    longest = personalise(change(keeping, "training", steps=5), resume=True)
    assert [snapshot.step for snapshot in longest.snapshots] == [1, 2, 3, 4]
    assert {p.name[0] for p in (longest.folder / "snapshots").iterdir()} == {"s"}
    anew = personalise(change(keeping, "output", save_lora_every=2), overwrite=True)
    assert steps_kept(anew.folder) == [2]


def test_a_skipped_step_of_float16_has_its_snapshot_too(plain, monkeypatch):
    loss = SubjectTrainer._loss

    def overflow_once(self, batch):
        total, *parts = loss(self, batch)
        return total * (1e38 if self.step == 1 else 1.0), *parts

    monkeypatch.setattr(SubjectTrainer, "_loss", overflow_once)
    half = change(change(plain, "training", precision="float16"), "output", save_lora_every=1)
    result = personalise(half)
    first, second = (snapshot.path for snapshot in result.snapshots)
    assert same_lora(first, second)
    assert not same_lora(second, result.lora)


@pytest.fixture(params=["kohya", "peft"])
def kept(plain, request):
    """A finished run of three steps with a snapshot of each, its LoRA, and the settings of it."""
    settings = change(plain, "output", save_lora_every=1, layout=request.param)
    return personalise(settings), settings


def full_disk(*_arguments):
    raise OSError("no space left")


def test_a_picked_snapshot_is_the_run_s_lora_and_the_earlier_one_stays(kept, capsys, monkeypatch):
    run, settings = kept
    with monkeypatch.context() as patched:
        patched.setattr(snapshots, "write_json_atomic", full_disk)
        with pytest.raises(OSError, match="no space"):
            pick_snapshot(run.folder, 1)
    assert inspect_lora(run.folder).path == run.lora  # as it was
    final = run.folder / f"copy{run.lora.suffix}"
    snapshots._copy(run.lora, final)
    chosen = run.snapshots[0].path
    assert main(["pick", str(run.folder), "--step", "1"]) == 0
    picked = run.folder / chosen.name
    assert capsys.readouterr().out == f"{picked}\n"
    assert same_lora(picked, chosen)
    record = json.loads((run.folder / "run.json").read_text("utf-8"))
    assert (record["export"]["file"], record["export"]["step"]) == (chosen.name, 1)
    assert [entry["step"] for entry in record["snapshots"]] == [1, 2, 3]
    assert not run.lora.exists()
    assert same_lora(run.folder / record["snapshots"][2]["file"], final)

    inspection = inspect_lora(run.folder)
    assert inspection.path == picked
    assert inspection.run is not None
    assert inspection.run["steps"] == 1
    use = LoRAUse.parse(f"{run.folder}:0.5")
    assert (use.path, use.strength) == (picked, 0.5)
    assert use.check() == ()

    with pytest.raises(ValueError, match=r"no LoRA of step 5; .* steps 1, 2, 3"):
        pick_snapshot(run.folder, 5)
    again = pick_snapshot(run.folder, 3)
    assert same_lora(again, final)
    assert [p.name for p in run.folder.glob("*-step-*")] == [again.name]
    assert pick_snapshot(run.folder, 3) == again
    assert inspect_lora(personalise(settings, resume=True).folder).path == run.lora


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_the_lora_of_a_finished_run_is_kept_when_it_gains_steps(plain, layout, tmp_path):
    settings = change(change(plain, "training", steps=2), "output", layout=layout)
    finished = personalise(settings)
    final = tmp_path / f"final{finished.lora.suffix}"
    snapshots._copy(finished.lora, final)
    assert steps_kept(personalise(settings, resume=True).folder) == []  # written anew, no steps
    longer = change(settings, "training", steps=4)
    with pytest.raises(KeyboardInterrupt):
        personalise(longer, resume=True, reporter=StopAt(3))
    assert [lora.step for lora in loras_of_run(finished.folder)] == [2]
    result = personalise(longer, resume=True)
    assert [(s.step, s.path.name) for s in result.snapshots] == [
        (2, f"{finished.lora.stem}-step-000002{finished.lora.suffix}")
    ]
    record = json.loads((result.folder / "run.json").read_text("utf-8"))
    assert [kept["step"] for kept in record["snapshots"]] == [2]
    assert [lora.step for lora in loras_of_run(result.folder)] == [2, 4]
    assert not same_lora(result.lora, final)
    assert same_lora(pick_snapshot(result.folder, 2), final)
    longest = personalise(change(settings, "training", steps=5), resume=True)
    assert [lora.step for lora in loras_of_run(longest.folder)] == [2, 4, 5]
    assert [p.name for p in longest.folder.glob("*-step-*")] == [
        record["snapshots"][0]["file"][10:]
    ]


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "x-step-000001.safetensors").touch()
    with pytest.raises(ValueError, match="goes on with --resume"):
        pick_snapshot(tmp_path, 1)
