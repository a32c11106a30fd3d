"""``cntlora evaluate`` from folders and from a LoRA file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from cntlora_core.cli import main
from cntlora_core.diffusion.compare import BASE_LABEL
from cntlora_core.diffusion.sampler import LoRAUse
from cntlora_core.lora_file.writing import LoRALayer, write_lora_file
from cntlora_core.metrics.generation import folder_names


@pytest.fixture
def lora(tiny_model: Path, tmp_path: Path) -> Path:
    """A random LoRA of the tiny model's attention, strong enough to be seen."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    generator = torch.Generator().manual_seed(3)
    layers = {
        f"unet.{name}": LoRALayer(
            torch.randn(2, module.in_features, generator=generator),
            torch.randn(module.out_features, 2, generator=generator),
            2.0,
        )
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_v"))
    }
    return write_lora_file(tmp_path / "my lora.safetensors", layers)


def encoder_flags(encoders: Path) -> list[str]:
    return [
        "--dino", str(encoders / "vision"), "--clip", str(encoders / "clip"), "--device", "cpu",
    ]  # fmt: skip


def test_folders_are_measured(
    tiny_encoders: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    made = tmp_path / "made"
    made.mkdir()
    for i in range(2):
        Image.new("RGB", (30, 30), (200, 90 * i, 10)).save(made / f"{i}.png")
        (made / f"{i}.txt").write_text(("a red dog", "a cat")[i])
    arguments = ["evaluate", "--subject", str(photo_folder), "--output", str(out)]
    arguments += ["--generated", str(made), str(photo_folder), *encoder_flags(tiny_encoders)]
    assert main(arguments) == 0
    record = json.loads((out / "fidelity.json").read_text("utf-8"))
    generated, photos, themselves = record["results"]
    assert [row["prompt"] for row in generated["by_prompt"]] == ["a red dog", "a cat"]
    assert photos["clip_t"] is None
    assert photos["dino"] > themselves["dino"] > generated["dino"]
    printed = capsys.readouterr().out
    assert f"{100 * generated['dino']:.1f}" in printed
    assert "the photos themselves" in printed
    with Image.open(out / "fidelity.png") as sheet:
        assert sheet.width > 300


def test_a_lora_is_sampled_with_and_measured_beside_the_base(
    tiny_encoders: Path, tiny_model: Path, photo_folder: Path, lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [
        "evaluate", "--subject", str(photo_folder), "--output", str(out),
        "--model", str(tiny_model), "--lora", str(lora), f"{lora}:0",
        "--prompt", "a photo of {}", "a red dog", "--token", "sks", "--class-name", "dog",
        "--per-prompt", "2", "--steps", "1", *encoder_flags(tiny_encoders),
    ]  # fmt: skip
    assert main(arguments) == 0
    results = json.loads((out / "fidelity.json").read_text("utf-8"))["results"]
    base, strong, off, _ = results
    assert [r["label"] for r in results[:3]] == ["without a LoRA", "my lora", "my lora at 0"]
    assert {r["pictures"] for r in results[:3]} == {4}
    assert strong["dino"] != base["dino"]
    for name in ("dino", "clip_i", "clip_t"):
        assert off[name] == pytest.approx(base[name], abs=1e-6)
    assert [row["prompt"] for row in base["by_prompt"]] == ["a photo of sks dog", "a red dog"]
    # What was generated can be measured again, to the same numbers.
    again = tmp_path / "again"
    folder = out / "my_lora"
    arguments = ["evaluate", "--subject", str(photo_folder), "--output", str(again)]
    arguments += ["--generated", str(folder), "--token", "sks", *encoder_flags(tiny_encoders)]
    assert main(arguments) == 0
    second = json.loads((again / "fidelity.json").read_text("utf-8"))["results"][0]
    for name in ("dino", "clip_i", "clip_t"):
        assert second[name] == pytest.approx(strong[name], abs=1e-6)


def test_loras_whose_names_look_alike_get_folders_that_differ() -> None:
    stems = ["x!", "x?", "x", "X", "without a LoRA", "x (2)", "x"]
    names = folder_names([LoRAUse(Path(f"{stem}.safetensors")) for stem in stems])
    assert names[BASE_LABEL] == "without_a_LoRA"
    assert len({name.casefold() for name in names.values()}) == len(stems) + 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "nothing to measure"),
        (["--lora", "a.safetensors", "--generated", "."], "LoRA files need a --model"),
        (["--generated", "{photos}", "--prompt", "a", "b"], "only one can stand for all"),
        (["--generated", "{photos}", "--prompt", "a {}"], "give a token and a class name"),
        (["--generated", "{photos}/none"], "none"),
    ],
)
def test_bad_input_is_said_in_words(
    tiny_encoders: Path,
    photo_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    arguments = ["evaluate", "--subject", str(photo_folder), "--output", str(tmp_path / "out")]
    arguments += [text.format(photos=photo_folder) if "photos" in text else text for text in more]
    assert main([*arguments, *encoder_flags(tiny_encoders)]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "fidelity.json").exists()
