"""Training, going on and exporting on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.sampler import LoRAUse, generate, load_for_sampling
from cntlora_core.diffusion.settings import SamplingSettings
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.runtime.precision import best_precision, tensor_cores

from .conftest import StopAt, change, losses

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture
def on_gpu(settings):
    return change(settings, "training", device="cuda", batch_size=2)


def test_the_loss_course_is_that_of_the_cpu(on_gpu, tmp_path):
    exact = change(on_gpu, "training", precision="float32")
    there = personalise(exact)
    elsewhere = change(exact, "output", output=str(tmp_path / "cpu"))
    here = personalise(change(elsewhere, "training", device="cpu"))
    assert losses(there) == pytest.approx(losses(here), rel=1e-2)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_a_run_is_trained_resumed_exported_and_sampled_from(on_gpu, precision):
    asked = change(on_gpu, "training", precision=precision)
    with pytest.raises(KeyboardInterrupt):
        personalise(asked, reporter=StopAt(4))
    result = personalise(asked, resume=True)
    assert len(result.history) == 6
    assert all(torch.isfinite(torch.tensor(losses(result))))
    chosen = json.loads((result.folder / "run.json").read_text())["settings"]["training"]
    expected = best_precision(torch.device("cuda")) if precision == "auto" else precision
    assert chosen["precision"] == expected
    assert all(bool(torch.isfinite(t).all()) for t in load_file(result.lora).values())
    pipeline = load_for_sampling(asked.model, [LoRAUse(result.lora)], device="cuda")
    generate(pipeline, ["a photo of sks dog"], SamplingSettings(steps=1))


def test_a_step_does_not_wait_for_the_gpu(on_gpu, monkeypatch):
    one_step = SubjectTrainer._one_step

    def watched(trainer):
        if trainer.step > 0:  # the first sets things up
            torch.cuda.set_sync_debug_mode("error")
        try:
            one_step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(SubjectTrainer, "_one_step", watched)
    assert len(personalise(on_gpu).history) == 6


def test_memory_that_runs_out_on_the_gpu_changes_no_loss(on_gpu, monkeypatch):
    whole = personalise(change(on_gpu, "training", precision="float32"))
    init = SubjectTrainer.__init__

    def short_of_memory(trainer, *rest, **options):
        init(trainer, *rest, **options)
        calls = iter(range(2))

        def fail(_module, _arguments):
            if next(calls, None) is not None:
                torch.empty(2**60, device="cuda")

        trainer.unet.register_forward_pre_hook(fail)

    monkeypatch.setattr(SubjectTrainer, "__init__", short_of_memory)
    again = personalise(change(on_gpu, "training", precision="float32"), overwrite=True)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-2)
    assert sum("memory ran out" in note for note in again.notes) == 2


def test_products_use_tensor_cores_within_steps_only():
    before = torch.backends.cuda.matmul.allow_tf32
    with tensor_cores(torch.device("cuda")):
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before
