"""Precision by itself, steps without waiting for the device, and steps where memory runs out."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cntlora_core.adapter.inject import adapter_layers
from cntlora_core.diffusion import job
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.memory_use import MemoryUse
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.runtime.precision import best_precision

from .conftest import StopAt, change, losses


@pytest.fixture
def short(settings):
    """Three steps of two photos and two class images, from the plain initialisation."""
    settings = change(settings, "training", steps=3, batch_size=2)
    return change(settings, "adapter", method="lora")


def run_out(monkeypatch, times):
    """The first so many passes of the UNet end as CUDA ends them where memory runs out."""
    init, calls = SubjectTrainer.__init__, itertools.count()

    def hooked(trainer, *rest, **options):
        init(trainer, *rest, **options)

        def fail(_module, _arguments):
            if next(calls) < times:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        trainer.unet.register_forward_pre_hook(fail)

    monkeypatch.setattr(SubjectTrainer, "__init__", hooked)


def test_where_memory_runs_out_a_step_is_done_again_with_less(short, monkeypatch):
    whole = personalise(change(short, "training", gradient_checkpointing=True))
    run_out(monkeypatch, 3)
    said = []

    def reporter(_stage, _done, _total, values):
        said.extend([values["note"]] if "memory" in values.get("note", "") else [])

    with pytest.raises(KeyboardInterrupt):
        personalise(short, overwrite=True, reporter=StopAt(2))
    state = job.TrainingState.load(whole.folder / job.STATE_NAME)
    assert state.extra["memory"] == {"checkpointing": True, "at_once": 1}
    run_out(monkeypatch, 3)
    result = personalise(short, overwrite=True, reporter=reporter)
    assert losses(result) == pytest.approx(losses(whole), rel=1e-5)
    notes = json.loads((result.folder / "run.json").read_text())["notes"]
    assert [note for note in notes if "memory" in note] == said
    for note, words in zip(said, ("checkpointing", "4 photos and class images", "one by one")):
        assert "step 1 and all after it" in note
        assert words in note


def test_where_nothing_is_left_to_lower_the_lack_of_memory_is_raised(short, monkeypatch):
    run_out(monkeypatch, 10**6)
    with pytest.raises(torch.OutOfMemoryError):
        personalise(short)


def test_less_memory_step_by_step():
    use, notes = MemoryUse(), []
    while (note := use.lower(5)) is not None:
        notes.append((use.at_once, list(map(list, use.parts(range(5))))))
        assert note
    assert use.checkpointing
    assert [at_once for at_once, _ in notes] == [None, 3, 2, 1]
    assert notes[1][1] == [[0, 1, 2], [3, 4]]


class Waits(TorchDispatchMode):
    """Operations whose result the host has to wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_steps_wait_for_nothing_but_every_tenth(short, monkeypatch, precision):
    one_step, waits, dtypes = SubjectTrainer._one_step, [], set()

    def watched(trainer):
        trainer._look_every = 2
        batch = SubjectTrainer._batch(trainer, 0)  # it is drawn on the CPU
        trainer._batch = lambda _micro: batch
        layer = next(iter(adapter_layers(trainer.unet).values()))
        handle = layer.lora_A["default"].register_forward_hook(
            lambda module, _i, output: dtypes.add((module.weight.dtype, output.dtype))
        )
        with Waits() as seen:
            one_step(trainer)
        handle.remove()
        waits.append(seen.found)

    monkeypatch.setattr(SubjectTrainer, "_one_step", watched)
    result = personalise(change(short, "training", precision=precision, steps=5))
    assert waits == [[]] * 5
    assert dtypes == {(torch.float32, getattr(torch, precision))}
    assert [sorted(record) for record in result.history] == [sorted(result.history[0])] * 5
    assert [record["skipped"] for record in result.history] == [0.0] * 5


def test_what_is_looked_at_less_often_is_the_same(short, monkeypatch, tmp_path):
    every_step = personalise(short)
    monkeypatch.setattr("cntlora_core.diffusion.trainer.STEPS_BETWEEN_LOOKS", 2)
    init = SubjectTrainer.__init__

    def as_on_a_gpu(trainer, *rest, **options):
        init(trainer, *rest, **options)
        trainer._look_every = 2

    monkeypatch.setattr(SubjectTrainer, "__init__", as_on_a_gpu)
    told = []

    def reporter(stage, done, _total, values):
        if stage == "training":
            told.append((done, values["loss"]))

    now_and_then = personalise(short, overwrite=True, reporter=reporter)
    assert losses(now_and_then) == losses(every_step)
    assert told == list(enumerate(losses(every_step), 1))


def test_the_precision_follows_from_the_device(short, monkeypatch):
    assert short.training.precision == "auto"
    result = personalise(short)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["settings"]["training"]["precision"] == "float32"
    assert best_precision(torch.device("mps")) == "float32"
    for supported, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda yes=supported, **_: yes)
        assert best_precision(torch.device("cuda")) == expected


def test_attention_is_computed_by_the_fused_kernels(tiny_model):
    from diffusers.models.attention_processor import AttnProcessor2_0

    from cntlora_core.diffusion.pipeline import load_stable_diffusion

    parts = load_stable_diffusion(tiny_model)
    assert {type(p) for p in parts.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert parts.networks["text_encoder"].config._attn_implementation == "sdpa"
