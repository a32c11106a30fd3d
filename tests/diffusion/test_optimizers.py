"""Optimisers and schedules; how the text encoder learns: rate, last step, last layer."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from cntlora_core import mini
from cntlora_core.diffusion import job
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.optimizers import build_schedule
from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.diffusion.sampler import LoRAUse, load_for_sampling
from cntlora_core.diffusion.settings import AdapterSettings, PriorSettings, TrainingSettings

from .conftest import StopAt, change, losses

HAS_8BIT = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture
def moved(settings, train_and_keep):
    """Trains plain LoRA; returns how far each tensor moved."""

    def train(**training) -> dict[str, float]:
        asked = change(change(settings, "training", **training), "adapter", method="lora")
        trainer, initial = train_and_keep(asked)
        return {
            n: float((p.detach() - initial[n]).abs().max()) for n, p in trainer.parameters.items()
        }

    return train


def rates(by_name: dict[str, float]) -> tuple[float, float]:
    """The largest step of denoiser and text encoder; the down factors have no gradient yet."""
    text = [d for n, d in by_name.items() if n.startswith("text_encoder.") and n.endswith(".up")]
    rest = [d for n, d in by_name.items() if n.startswith("unet.") and n.endswith(".up")]
    return max(rest), max(text)


@pytest.mark.parametrize(("asked", "factor"), [(None, 0.5), (2e-3, 2.0)])
def test_the_text_encoder_has_a_learning_rate_of_its_own(moved, asked, factor):
    denoiser, text = rates(moved(steps=1, text_encoder_lr=asked, weight_decay=0.0))
    assert denoiser == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is the learning rate
    assert text == pytest.approx(factor * denoiser, rel=1e-3)


def test_the_text_encoder_stops_learning(moved):
    until = moved(steps=3)
    stopped = moved(steps=6, text_encoder_steps=3)
    for name, distance in stopped.items():
        if name.startswith("text_encoder."):
            assert distance == until[name]
    assert rates(stopped)[0] > 1.5 * rates(until)[0]


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "prodigy", "learning_rate": 1.0},
        pytest.param({"text_encoder_steps": 2, "caption_dropout": 0.5}, marks=pytest.mark.thorough),
        pytest.param(
            {"text_encoder_steps": 5, "lr_schedule": "cosine_with_restarts", "lr_cycles": 2},
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"lr_schedule": "piecewise_constant", "lr_step_rules": "1:3,0.1"},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(settings, tmp_path, training):
    settings = change(settings, "training", **training)
    whole = personalise(settings)
    again = change(settings, "output", output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        personalise(again, reporter=StopAt(4))
    resumed = personalise(again, resume=True)
    assert losses(resumed) == losses(whole)
    a, b = load_file(whole.lora), load_file(resumed.lora)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert resumed.history == [
        {**record, "seconds": other["seconds"]}
        for record, other in zip(whole.history, resumed.history, strict=True)
    ]


def test_dropped_captions_are_read_as_the_empty_prompt(settings, monkeypatch):
    read = []
    loss = job.SubjectTrainer._loss

    def keep(trainer, batch):
        read.append((trainer.data.empty_tokens == batch.tokens[0]).all().item())
        return loss(trainer, batch)

    monkeypatch.setattr(job.SubjectTrainer, "_loss", keep)
    personalise(change(settings, "training", steps=30, caption_dropout=0.5))
    assert 5 <= sum(read) <= 25
    read.clear()
    personalise(change(settings, "training", steps=3), overwrite=True)
    assert not any(read)


def test_clip_skip_reads_the_layer_before_the_last_and_trains_none_behind_it(settings):
    whole = load_stable_diffusion(settings.model)
    ids = whole.tokenizer("a photo", padding="max_length", return_tensors="pt")["input_ids"]
    before_last = whole.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    norms = (m for n, m in whole.text_encoder.named_modules() if n.endswith("final_layer_norm"))
    ours = load_stable_diffusion(settings.model, clip_skip=2)
    assert torch.equal(ours.text_encoder(ids)[0], next(norms)(before_last))
    assert ours.fingerprint != whole.fingerprint

    result = personalise(dataclasses.replace(settings, clip_skip=2))
    names = load_file(result.lora).keys()
    assert any(name.startswith("lora_te") and "layers_0" in name for name in names)
    assert not any(name.startswith("lora_te") and "layers_1" in name for name in names)
    sampled = load_for_sampling(settings.model, [LoRAUse(result.lora)], clip_skip=2)
    plain = load_for_sampling(settings.model, [LoRAUse(result.lora)])
    texts = [p.encode_prompt("a photo", "cpu", 1, False)[0] for p in (sampled, plain)]
    assert not torch.allclose(*texts)


def test_a_clip_skip_of_all_layers_is_refused(settings):
    with pytest.raises(ValueError, match="use at most 2"):
        personalise(dataclasses.replace(settings, clip_skip=3))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"optimizer": "prodigy", "text_encoder_lr": 1e-5}, "leave text_encoder_lr out"),
        ({"lr_schedule": "piecewise_constant"}, "1:100,0.1"),
        ({"lr_step_rules": "1:500,0.1"}, "piecewise_constant"),
        ({"caption_dropout": 1.0}, "less than 1"),
        ({"text_encoder_steps": 0}, "at least 1"),
        ({"optimizer": "prodigy"}, "use learning_rate=1"),
        ({"optimizer": "prodigy", "learning_rate": 0.09}, "use learning_rate=1"),
        ({"lr_schedule": "cosine_with_restarts"}, r"no restart: use lr_cycles=3, or .*'cosine'"),
        ({"lr_schedule": "polynomial"}, r"is linear: use lr_power=2, or .*'linear'"),
        ({"lr_cycles": 3}, "lr_cycles=3 has no effect with lr_schedule='cosine'"),
        ({"lr_schedule": "cosine", "lr_power": 2.0}, "lr_power=2.0 has no effect"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        TrainingSettings(**wrong)


@pytest.mark.parametrize("given", [{"text_encoder_lr": 1e-5}, {"text_encoder_steps": 5}])
def test_settings_of_a_text_encoder_that_is_not_adapted_are_refused(settings, given):
    settings = change(settings, "training", **given)
    with pytest.raises(ValueError, match=r"has no effect without train_text_encoder"):
        change(settings, "adapter", train_text_encoder=False)


@pytest.mark.parametrize("given", [{"convolutions": False}, {"orthogonality": 0.0},
                                   {"orthogonal_factors": ("U", "V")}])  # fmt: skip
def test_settings_of_lava_are_refused_for_a_lora(given):
    assert AdapterSettings(adapter="lava", **given)
    with pytest.raises(ValueError, match=r"has no effect with adapter='lora', but with lava"):
        AdapterSettings(**given)


@pytest.mark.parametrize(
    "given",
    [{"num_class_images": 5}, {"class_steps": 5}, {"class_guidance": 5.0}, {"class_seed": 5}],
)
def test_settings_of_generated_class_images_are_refused_for_a_folder(given):
    assert PriorSettings(**given)
    assert PriorSettings(class_images="dogs")
    with pytest.raises(ValueError, match=r"=5.* has no effect on the class images of a folder"):
        PriorSettings(class_images="dogs", **given)


def rates_of(training: TrainingSettings) -> list[float]:
    """The learning rate of each step, relative to the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = build_schedule(optimizer, training), []
    for _ in range(training.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_with_restarts_restarts_and_polynomial_is_not_linear():
    restarts = rates_of(TrainingSettings(steps=90, lr_schedule="cosine_with_restarts", lr_cycles=3))
    assert [i for i, rate in enumerate(restarts) if rate == 1.0] == [0, 30, 60]
    curved = rates_of(TrainingSettings(steps=90, lr_schedule="polynomial", lr_power=2.0))
    straight = rates_of(TrainingSettings(steps=90, lr_schedule="linear"))
    assert curved[45] == pytest.approx(straight[45] ** 2, rel=1e-3)


@pytest.mark.skipif(not HAS_8BIT, reason="bitsandbytes is not installed")
def test_the_8_bit_state_is_saved_as_it_is(settings, tmp_path):
    """On the small model: tensors of fewer than 4096 numbers have a state of 32 bits."""
    settings = dataclasses.replace(settings, model=str(mini.model_path()))
    settings = change(
        change(settings, "adapter", method="lora", rank=64), "prior", prior_weight=0.0
    )
    settings = change(settings, "training", optimizer="adamw_8bit", steps=4, save_every=1)
    whole = personalise(settings)
    again = change(settings, "output", output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        personalise(again, reporter=StopAt(2))
    state = load_file(tmp_path / "again" / job.STATE_NAME)
    assert torch.uint8 in {tensor.dtype for tensor in state.values()}
    a, b = load_file(whole.lora), load_file(personalise(again, resume=True).lora)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.skipif(HAS_8BIT, reason="bitsandbytes is installed")
def test_a_missing_package_is_named(settings):
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        personalise(change(settings, "training", optimizer="adamw_8bit"))
