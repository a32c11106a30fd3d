"""Two processes train what one trains; they are cancelled together; what cannot work is refused."""

from __future__ import annotations

import json
import math
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from cntlora_core import cli
from cntlora_core.diffusion.batches import share_of
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.run_identity import STATE_NAME, steps_in
from cntlora_core.diffusion.settings import TrainingSettings
from cntlora_core.runtime.processes import require_devices

from ..conftest import ForkedCommand, change, command, losses


@pytest.fixture
def two(settings):
    """Two photos and two class images a step."""
    return change(settings, "training", batch_size=2, save_every=1, steps=10_000)


def flags(settings, *more):
    steps = str(settings.training.steps)
    return command(settings, "--batch-size", "2", "--steps", steps, *more)


@pytest.mark.thorough
def test_two_processes_train_what_one_does_and_stop_together(two, tmp_path):
    arguments = flags(two, "--processes", "2", "--save-every", "1", "--sample-prompts", "a dog")
    folder = tmp_path / "out put"
    started = ForkedCommand(arguments, tmp_path)
    deadline = time.monotonic() + 300
    while steps_in(folder) < 2:
        assert started.running, (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    status, said, errors = started.end(signal.SIGINT)
    assert (status, said) == (130, ""), errors
    assert errors.count("the run goes on with --resume") == 1
    steps = steps_in(folder)
    assert not (folder / ".running.json").exists()
    several = personalise(change(two, "training", steps=steps), resume=True)
    assert any("all" in note and "steps were done before" in note for note in several.notes)
    record = json.loads((folder / "run.json").read_text())
    assert record["initialization"]["processes"] == 2
    alone = change(change(two, "training", steps=steps), "output", output=str(tmp_path / "alone"))
    one = personalise(alone)
    assert losses(several) == pytest.approx(losses(one), rel=1e-4)
    a, b = load_file(several.lora), load_file(one.lora)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if tensor.ndim < 2:
            assert torch.equal(tensor, b[name])
    # Each layer is close, and most are closer: AdamW's first steps are as long where a gradient is
    # next to nothing, and rounding decides on its sign.
    differences, norms = [], []
    for up in (name for name in a if name.endswith("lora_up.weight")):
        down = up.replace("lora_up", "lora_down")
        deltas = [f[up].float().flatten(1) @ f[down].float().flatten(1) for f in (a, b)]
        differences.append(float((deltas[0] - deltas[1]).norm()))
        norms.append(float(deltas[1].norm()))
    assert math.hypot(*differences) <= 0.02 * math.hypot(*norms)
    assert all(one <= 0.1 * norm + 1e-6 for one, norm in zip(differences, norms, strict=True))
    assert (folder / STATE_NAME).exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--processes", "3"), "3 processes cannot share a step of batch_size=2"),
        (("--processes", "0"), "processes must be at least 1"),
        (("--processes", "2", "--device", "cuda"), "this machine has 1 GPU: use one process, or"),
        (("--processes", "2", "--device", "cuda:1"), "leave --device out, or use --device cpu"),
    ],
)
def test_what_cannot_work_is_refused_before_it_begins(two, capsys, monkeypatch, more, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(flags(two, *more)) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_devices_of_a_machine_are_enough_or_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    require_devices(4, None)
    with pytest.raises(ValueError, match=r"has 4 GPUs: use at most 4 processes, or --device cpu"):
        require_devices(5, None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"has no GPU: use one process, or --device cpu"):
        require_devices(2, None)
    require_devices(2, "cpu")


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4), (2, 3), (3, 2)])
def test_each_photo_of_a_step_is_one_process_s(batch_size, accumulation):
    training = TrainingSettings(batch_size=batch_size, gradient_accumulation=accumulation)
    for micro in range(accumulation):
        shares = [share_of(training, micro, rank, 2) or () for rank in range(2)]
        assert sorted(place for share in shares for place in share) == list(range(batch_size))
