"""What a model predicts: the marks of a single file, a person's word, and the noise schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from cntlora_core.diffusion.checkpoint import CheckpointError
from cntlora_core.diffusion.objective import min_snr_weights, training_target
from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
from cntlora_core.diffusion.schedulers import noise_scheduler, sampler
from cntlora_core.diffusion.settings import SchedulerName

from .conftest import assert_same, change_json, load_narrow

V_PRED, ZTSNR = "v_pred", "ztsnr"
NO_ZERO_SNR = {"pndm", "heun"}


@pytest.fixture
def marked(single: Path, tmp_path: Path) -> Any:
    """Writes the single file with marks: empty tensors, as models have them, and a header."""

    def write(*marks: str, predicts: str | None = None) -> Path:
        path = tmp_path / f"{'-'.join(marks)} {predicts}.safetensors"
        header = {} if predicts is None else {"modelspec.prediction_type": predicts}
        save_file({**load_file(single), **{m: torch.tensor([]) for m in marks}}, path, header)
        return path

    return write


def schedule_of(parts: StableDiffusionParts) -> tuple[str, bool]:
    """What is predicted, and whether the last timestep is nothing but noise."""
    kind = parts.noise_scheduler.config["prediction_type"]
    assert parts.pipeline().scheduler.config["prediction_type"] == kind
    return kind, float(parts.noise_scheduler.alphas_cumprod[-1]) == 0


@pytest.mark.parametrize(
    ("marks", "predicts", "expected"),
    [
        ((), None, ("epsilon", False)),
        ((V_PRED,), None, ("v_prediction", False)),
        ((V_PRED, ZTSNR), None, ("v_prediction", True)),
        ((), "v", ("v_prediction", False)),
        ((ZTSNR,), "v_prediction", ("v_prediction", True)),
        ((), "epsilon", ("epsilon", False)),
        ((ZTSNR,), None, ("epsilon", False)),
        ((), "no such type", ("epsilon", False)),
        ((V_PRED, ZTSNR), "epsilon", ("v_prediction", True)),
    ],
)
def test_a_single_file_is_trained_and_sampled_by_its_marks(
    marked: Any, narrow: Path, made: StableDiffusionParts, marks, predicts, expected
) -> None:
    parts = load_narrow(marked(*marks, predicts=predicts), narrow)
    assert_same(made, parts)
    assert schedule_of(parts) == expected
    if expected[1]:
        assert parts.pipeline().scheduler.config["timestep_spacing"] == "trailing"


@pytest.mark.thorough
def test_a_person_s_word_goes_before_the_marks(marked: Any, narrow: Path, folder: Path) -> None:
    plain, both = marked(), marked(V_PRED, ZTSNR)
    told = load_narrow(plain, narrow, prediction_type="v_prediction")
    assert schedule_of(told) == ("v_prediction", False)
    assert schedule_of(load_narrow(both, narrow, prediction_type="epsilon")) == ("epsilon", False)
    told = load_narrow(both, narrow, prediction_type="v_prediction")
    assert schedule_of(told) == ("v_prediction", True)
    told = load_stable_diffusion(folder, prediction_type="v_prediction")
    assert schedule_of(told) == ("v_prediction", False)


@pytest.mark.thorough
def test_the_fingerprint_says_what_is_predicted(marked: Any, narrow: Path) -> None:
    """So that class images and unfinished trainings under another objective are not reused."""
    plain = marked()
    weights = load_narrow(plain, narrow).fingerprint
    assert len(weights) == 16
    told = load_narrow(plain, narrow, prediction_type="v_prediction").fingerprint
    assert told == f"{weights}-v_prediction"
    assert load_narrow(marked(V_PRED, ZTSNR), narrow).fingerprint.endswith("-v_prediction-zero-snr")


@pytest.mark.parametrize("name", [None, *get_args(SchedulerName)])
def test_a_zero_terminal_snr_divides_by_nothing(marked: Any, narrow: Path, name: Any) -> None:
    parts = load_narrow(marked(V_PRED, ZTSNR), narrow)
    if name in NO_ZERO_SNR:
        with pytest.raises(ValueError, match=r"cannot sample from a zero terminal SNR.*euler"):
            parts.pipeline(name)
        return
    pipeline: Any = parts.pipeline(name)
    pipeline.scheduler.set_timesteps(3)
    assert int(pipeline.scheduler.timesteps[0]) == 999  # where no signal is left
    latents = pipeline("a cat", num_inference_steps=3, output_type="latent").images
    assert torch.isfinite(latents).all()
    assert latents.abs().max() < 100


def test_the_loss_of_the_last_timestep_is_finite(marked: Any, narrow: Path) -> None:
    schedule: Any = load_narrow(marked(V_PRED, ZTSNR), narrow).noise_scheduler
    times = torch.tensor([0, 500, 999])
    weights = min_snr_weights(schedule, times, 5.0)
    assert torch.isfinite(weights).all()
    assert (weights[1] > 0, weights[2] == 0) == (True, True)
    latents, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    assert torch.equal(schedule.add_noise(latents, noise, times)[2], noise[2])
    assert torch.allclose(training_target(schedule, latents, noise, times)[2], -latents[2])


def test_epsilon_under_a_zero_terminal_snr_is_refused(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    change_json(file, rescale_betas_zero_snr=True, _class_name="DDIMScheduler")
    with pytest.raises(ValueError, match="such models predict v_prediction"):
        load_stable_diffusion(folder)
    change_json(file, prediction_type="v_prediction")
    assert schedule_of(load_stable_diffusion(folder)) == ("v_prediction", True)


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_single_file_with_the_marks_of_edm_is_refused(
    marked: Any, narrow: Path, mark: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"EDM model \(it has {mark}\).*v_prediction"):
        load_narrow(marked(mark), narrow)


@pytest.mark.parametrize(
    "name",
    ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"],
)
def test_a_folder_of_a_continuous_noise_schedule_is_refused(folder: Path, name: str) -> None:
    """As Playground v2.5's."""
    change_json(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(ValueError, match=rf"{name} has no discrete noise schedule.*v_prediction"):
        load_stable_diffusion(folder)


def test_continuous_timesteps_are_refused() -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}
    config |= {"sigma_min": 0.002, "sigma_max": 120.0, "prediction_type": "v_prediction"}
    assert sampler(None, config).config["timestep_type"] == "continuous"
    with pytest.raises(ValueError, match="no discrete noise schedule"):
        noise_scheduler(config)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_a_vae_that_normalises_by_channel_is_refused(folder: Path, name: str) -> None:
    change_json(folder / "vae" / "config.json", **{name: [0.5, -1.0, 2.0, 1.5]})
    with pytest.raises(ValueError, match=f"{name} is set"):
        load_stable_diffusion(folder)
    change_json(folder / "vae" / "config.json", **{name: None})
    load_stable_diffusion(folder)
