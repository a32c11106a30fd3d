"""Sound inputs, made once; damaged copies of them; and the command run in this process."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from cntlora_core.cli import main
from cntlora_core.lora_file.algebra import LoRALayer
from cntlora_core.lora_file.writing import write_lora_file

from .damage import Change

ADVICE = re.compile(
    r"\b(give|use|choose|download|copy|make|save|name|put|write|try|lower|remove|convert|train|"
    r"start|helptext|one of|needed|needs|must|should|expected|run|known|want|instead|free|leave|"
    r"are|can)\b",
    re.IGNORECASE,
)
"""A word of what to do, or of what was expected."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every second of the generated inputs is left to `make test-slow`: the whole set is large."""
    generated = [
        item for item in items
        if item.path.parent == Path(__file__).parent and item.path.name != "test_words.py"
    ]  # fmt: skip
    for item in generated[1::2]:
        item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class Sound:
    """Inputs that work, apart from what a test damages.

    Attributes:
        model: A diffusers folder.
        encoders: Folders ``vision`` and ``clip``.
        lora: A LoRA for the model, in kohya's layout.
        photos: Photos of a subject.
        interrupted: The output folder of an interrupted run.
    """

    model: Path
    encoders: Path
    lora: Path
    photos: Path
    interrupted: Path


def train_flags(model: Path | str, photos: Path | str, output: Path | str) -> list[str]:
    return [
        "train", "--model", str(model), "--images", str(photos), "--token", "sks",
        "--class-name", "dog", "--output", str(output), "--cache", str(output) + " cache",
        "--prior-weight", "0", "--rank", "2", "--method", "lora", "--steps", "2", "--save-every",
        "1", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def sound(tiny_model: Path, tiny_encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    from diffusers import UNet2DConditionModel

    base = tmp_path_factory.mktemp("sound")
    photos = base / "photos"
    photos.mkdir()
    for i in range(2):
        Image.new("RGB", (40, 40), (40 * i, 90, 200)).save(photos / f"{i}.png")
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    generator = torch.Generator().manual_seed(3)
    layers = {
        f"unet.{name}": LoRALayer(
            torch.randn(2, module.in_features, generator=generator) / 10,
            torch.randn(module.out_features, 2, generator=generator) / 10,
            2.0,
        )
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_v"))
    }
    lora = write_lora_file(base / "sound.safetensors", layers)
    interrupted = base / "interrupted"
    _interrupt(train_flags(tiny_model, photos, interrupted))
    return Sound(tiny_model, tiny_encoders, lora, photos, interrupted)


def _interrupt(flags: list[str]) -> None:
    """Train until a state is there, then stop as Ctrl-C does."""
    from cntlora_core.diffusion.trainer import SubjectTrainer

    one_step = SubjectTrainer._one_step

    def stop_after_one(trainer: SubjectTrainer) -> object:
        if trainer.step == 1:
            raise KeyboardInterrupt
        return one_step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubjectTrainer, "_one_step", stop_after_one)
        assert main(flags) == 130


def damaged_copy(source: Path, target: Path, inside: str, change: Change) -> Path:
    """A folder that shares its files with the sound one, apart from the damaged one."""
    shutil.copytree(source, target, copy_function=os.link)
    damaged = target / inside
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(change(content))
    if inside in ("tokenizer/vocab.json", "tokenizer/merges.txt"):
        (target / "tokenizer/tokenizer.json").unlink(missing_ok=True)  # read before them
    return target


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Standard error in one line, without the frames that are drawn around it."""
        return " ".join(re.sub(r"[│╭╮╰╯─|]|[-]{2,}(?= )", " ", self.err).split())


Run = Callable[[Sequence[str]], Said]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command in this process; nothing it does may outlive it."""
    state = tmp_path / "state home"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capfd.readouterr()

    def run(arguments: Sequence[str]) -> Said:
        try:
            status = main(list(arguments))
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        out, err = capfd.readouterr()
        return Said(status, out, err)

    return run


def assert_refused(said: Said, named: str, output: Path | None = None) -> None:
    """Status 1 or 2, a message that names the input and says what to do, and nothing left."""
    assert said.status in (1, 2), (said.status, said.out, said.err)
    assert "Traceback" not in said.err, said.err
    assert "unexpected error" not in said.err, said.err
    assert "__tyro" not in said.err, said.err
    errors = said.text
    assert re.sub(r"\s", "", named) in re.sub(r"\s", "", errors), (named, errors)
    assert ADVICE.search(errors.replace(named, "")), errors
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", errors), repr(errors)
    if output is not None and output.exists():
        assert [path for path in output.iterdir() if path.name != ".lock"] == []
