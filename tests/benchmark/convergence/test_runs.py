"""A tiny grid on the small model: killed, gone on with, and measured as if it never had been."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.benchmark.convergence.command import (
    ConvergenceBenchmark,
    is_done,
    run_convergence,
    tasks_of,
)
from cntlora_core.benchmark.convergence.grid import read_grid
from cntlora_core.benchmark.convergence.run import begun, execute
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.diffusion.state import TrainingState

GRID = """
cache = "shared"
save_every = 1
[base]
subject = "penguin"
rank = 4
init_passes = 1
steps = 4
learning_rate = 1e-3
num_class_images = 2
class_steps = 1
[measure]
steps = [1, 2]
pictures_at = [1]
loss_passes = 1
drift_images = 2
prompts = ["a {} in the snow", "a {} wearing a hat"]
per_prompt = 1
sampling_steps = 1
[[grid]]
method = "cross"
[[grid]]
method = "lora_orthogonal"
rank = 3
[[grid]]
method = "plain-norms"
steps = 1
"""


def killed_when(path: Path, settings: ConvergenceBenchmark, seconds: float = 300) -> None:
    """Run the grid in a process of its own, which is killed as soon as the file is there."""
    fork = multiprocessing.get_context("fork")  # the imports are done already
    process = fork.Process(target=run_convergence, args=(settings,))
    process.start()
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive(), "the grid ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


@pytest.mark.slow
def test_a_grid_that_was_killed_goes_on_and_one_that_fails_blocks_none(grid_file, tmp_path):
    out = tmp_path / "out"
    cross, bad, control = tasks_of(read_grid(grid_file), out)
    settings = ConvergenceBenchmark(grid_file, out, workers=1)
    killed_when(cross.place / "state.safetensors", settings)
    assert not is_done(cross)
    generated = sorted((tmp_path / "shared").glob("class_images/*/*.png"))
    assert len(generated) == 2

    told = []
    with pytest.raises(ValueError, match="1 of 3 runs failed"):
        run_convergence(
            settings,
            lambda stage, done, total, values: told.append(values.get("note", "")),
        )
    assert any("lora_orthogonal" in note and "even rank" in note for note in told)
    assert "even rank" in json.loads((bad.place / "failed.json").read_text())["error"]
    assert (is_done(cross), is_done(bad), is_done(control)) == (True, False, True)
    assert sorted(path.name for path in cross.place.iterdir()) == [
        "run.json",
        "step-000001.jpg",
        "step-000004.jpg",
    ]

    record = json.loads((cross.place / "run.json").read_text())
    assert record["continued_after"]
    assert [row["step"] for row in record["rows"]] == [0, 1, 2, 4]
    assert len(record["training_loss"]) == 4
    assert record["rows"][0]["drift"] < 1e-10
    assert record["rows"][-1]["backgrounds"] in (0.0, 1.0)  # the hat says nothing of a background
    with Image.open(cross.place / "step-000004.jpg") as sheet:
        assert sheet.size == (64, 2 * 64)
    for name in ("initialization", "training", "measuring", "images"):
        assert record["seconds"][name] > 0
    assert record["peak_bytes"] > 1e8
    assert record["settings"]["method"] == "cross"
    assert record["machine"]["torch"]

    alone = dataclasses.replace(cross, folder=tmp_path / "alone")
    execute(alone)
    whole = json.loads((alone.place / "run.json").read_text())
    assert whole["continued_after"] == []
    assert whole["rows"] == record["rows"]
    assert whole["training_loss"] == record["training_loss"]

    first = json.loads((control.place / "run.json").read_text())
    assert first["settings"]["control_of"] == "cross"
    assert first["ranks"] == record["ranks"]


@pytest.mark.parametrize(
    ("rows", "key", "kept"),
    [
        ([0, 1, 2], "own", [0, 1, 2]),
        ([0, 1, 2, 4], "own", [0, 1, 2]),  # measured after the last state: measured again
        ([0, 1], "own", [0, 1]),  # stopped while it was measured after step 2
        ([0], "own", None),
        ([0, 1, 2], "another", None),
    ],
)
def test_a_run_goes_on_only_with_all_its_measurements(grid_file, tmp_path, rows, key, kept):
    cross = tasks_of(read_grid(grid_file), tmp_path)[0]
    assert begun(tmp_path, cross) is None
    down, up = torch.ones(1, 2), torch.zeros(2, 1)
    TrainingState(
        step=2,
        plan=AdapterPlan({"layer": Factors(down, up, 1.0)}, rewrites_base=False),
        parameters={"layer.down": down, "layer.up": up},
        moments={},
        history=[],
        settings={"key": cross.key if key == "own" else key},
    ).save(tmp_path / "state.safetensors")
    (tmp_path / "part.json").write_text(json.dumps({"rows": [{"step": step} for step in rows]}))
    found = begun(tmp_path, cross)
    assert (found and [row["step"] for row in found[1]["rows"]]) == kept


@pytest.mark.slow
def test_a_grid_runs_on_ray(grid_file, tmp_path):
    ray = pytest.importorskip("ray")
    grid_file.write_text(GRID.replace("rank = 3", "rank = 4"))
    out = tmp_path / "out"
    try:
        assert run_convergence(ConvergenceBenchmark(grid_file, out, ray="local")) == 3
    finally:
        ray.shutdown()
    assert all(is_done(task) for task in tasks_of(read_grid(grid_file), out))
