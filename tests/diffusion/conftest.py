"""The settings of a small job, ways to change and interrupt it, and its command line."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)


@pytest.fixture(scope="session")
def class_images(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the class images that the small job generates."""
    from cntlora_core.data.captions import subject_prompts
    from cntlora_core.diffusion.pipeline import load_stable_diffusion
    from cntlora_core.diffusion.prior import class_images

    prompt = subject_prompts("sks", "dog").class_prompt
    prior = PriorSettings(
        num_class_images=2, class_steps=2, cache=str(tmp_path_factory.mktemp("cache"))
    )
    class_images(load_stable_diffusion(str(tiny_model)), prompt, prior, resolution=32)
    return Path(str(prior.cache))


@pytest.fixture
def settings(
    tiny_model: Path, photo_folder: Path, class_images: Path, tmp_path: Path
) -> JobSettings:
    shutil.copytree(class_images, tmp_path / "cache")
    return JobSettings(
        model=str(tiny_model),
        subject=SubjectSettings(images=str(photo_folder), token="sks", class_name="dog"),
        output=OutputSettings(output=str(tmp_path / "out put")),
        prior=PriorSettings(num_class_images=2, class_steps=2, cache=str(tmp_path / "cache")),
        adapter=AdapterSettings(rank=4, alpha=8, init_passes=1),
        training=TrainingSettings(steps=6, lr_schedule="constant", save_every=2, device="cpu"),
    )


@pytest.fixture
def plain(settings, monkeypatch):
    """A short run from the plain initialisation, without class images and plots."""
    for plot in ("plot_loss", "plot_ranks"):
        monkeypatch.setattr(f"cntlora_core.diffusion.job.{plot}", lambda *_arguments: None)
    settings = change(change(settings, "prior", prior_weight=0.0), "adapter", method="lora")
    return change(settings, "training", steps=3, save_every=1)


@pytest.fixture
def train_and_keep(monkeypatch):
    """Trains without finishing; returns the trainer and its parameters at the start."""
    from cntlora_core.diffusion import job

    initial = {}
    run = job.SubjectTrainer.run

    def keep(trainer, **options):
        initial.update({n: p.detach().clone() for n, p in trainer.parameters.items()})
        run(trainer, **options)

    monkeypatch.setattr(job.SubjectTrainer, "run", keep)
    monkeypatch.setattr(job, "_finish", lambda trainer, *rest: trainer)

    def train(settings: JobSettings):
        return job.personalise(settings, overwrite=True), initial

    return train


def change(settings: JobSettings, part: str, **values: Any) -> JobSettings:
    new = dataclasses.replace(getattr(settings, part), **values)
    return dataclasses.replace(settings, **{part: new})


def losses(result) -> list[float]:
    return [record["loss"] for record in result.history]


class StopAt:
    """A reporter that raises after a number of training steps."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step, self.error = step, error or KeyboardInterrupt()
        self.stages: list[str] = []

    def __call__(self, stage: str, done: int, total: int, values: dict[str, Any]) -> None:
        self.stages.append(stage)
        if stage == "training" and done == self.step:
            raise self.error


class ForkedCommand:
    """The command in a process that has done its imports already; what it says goes to files."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._said = [folder / "stdout", folder / "stderr"]
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=self._run, args=(arguments,))
        self._process.start()
        self.pid = self._process.pid

    def _run(self, arguments: list[str]) -> None:
        from cntlora_core.cli import main

        for stream, path in zip((1, 2), self._said, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os._exit(_flushed(main(arguments)))

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def end(self, with_signal: signal.Signals | None = None) -> tuple[int | None, str, str]:
        """Exit status, output and errors, after a signal if one is given."""
        if with_signal is not None:
            os.kill(self._process.pid or 0, with_signal)
        self._process.join(300)
        return self._process.exitcode, *(path.read_text() for path in self._said)


def _flushed(status: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def command(settings: JobSettings, *more: str) -> list[str]:
    return [
        "train", "--model", settings.model, "--images", settings.subject.images,
        "--token", "sks", "--class-name", "dog", "--output", settings.output.output,
        "--cache", str(settings.prior.cache), "--num-class-images", "2", "--class-steps", "2",
        "--rank", "4", "--alpha", "8", "--init-passes", "1", "--lr-schedule", "constant",
        "--device", "cpu", "--save-every", "2", *more,
    ]  # fmt: skip
