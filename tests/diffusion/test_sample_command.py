"""``cntlora sample``: what becomes of images that are there, of placeholders, and the precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cntlora_core.cli import main
from cntlora_core.data.photos import pixel_digest
from cntlora_core.diffusion import sampler
from cntlora_core.diffusion.job import personalise
from cntlora_core.lora_file.writing import read_lora_file, write_lora_file
from cntlora_core.metrics.pictures import read_pictures

from .conftest import change


@pytest.fixture
def generate(tiny_model, tmp_path, capsys):
    """Runs the command into one folder; returns the names that it printed."""

    def run(*more: str) -> list[str]:
        arguments = ["--steps", "1", "--device", "cpu", "--output", str(tmp_path / "images")]
        status = main(["sample", "--model", str(tiny_model), *arguments, *more])
        said = capsys.readouterr()
        if status:
            raise ValueError(said.err)
        return [Path(line).name for line in said.out.splitlines()]

    return run


def test_an_image_is_never_replaced_by_another(generate, plain, tmp_path):
    lora = str(personalise(change(plain, "training", learning_rate=1.0)).lora)
    folder, prompt = tmp_path / "images", ("--prompt", "a photo of sks dog")
    assert generate(*prompt) == ["a_photo_of_sks_dog-0.png"]
    before = (folder / "a_photo_of_sks_dog-0.png").read_bytes()
    assert generate(*prompt) == ["a_photo_of_sks_dog-0.png"]  # the same image
    assert generate(*prompt, "--lora", lora) == ["a_photo_of_sks_dog-0-2.png"]
    assert generate(*prompt, "--lora", f"{lora}:0.5") == ["a_photo_of_sks_dog-0-3.png"]
    assert generate(*prompt, "--lora", lora) == ["a_photo_of_sks_dog-0-2.png"]
    assert (folder / "a_photo_of_sks_dog-0.png").read_bytes() == before
    digests = {pixel_digest(Image.open(path)) for path in folder.glob("*.png")}
    assert len(digests) == 3
    noted = json.loads((folder / "prompts.json").read_text("utf-8"))
    assert {name: entry["loras"] for name, entry in noted.items()} == {
        "a_photo_of_sks_dog-0.png": [],
        "a_photo_of_sks_dog-0-2.png": [{"file": lora, "strength": 1.0}],
        "a_photo_of_sks_dog-0-3.png": [{"file": lora, "strength": 0.5}],
    }
    assert read_pictures(folder).prompts == ("a photo of sks dog",) * 3
    (folder / "a_box-0.png").write_bytes(b"no picture")
    assert generate("--prompt", "a box") == ["a_box-0-2.png"]


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_placeholders_are_filled_in_from_the_lora(generate, plain, layout):
    result = personalise(change(change(plain, "training", steps=1), "output", layout=layout))
    prompts = ("--prompt", "a {} in the snow", "a {class} {token}")
    names = ["a_sks_dog_in_the_snow-0.png", "a_dog_sks-1.png"]
    assert generate(*prompts, "--lora", str(result.folder)) == names
    style = result.folder / "style.safetensors"
    write_lora_file(style, read_lora_file(result.lora).layers)
    loras = ("--lora", str(style), str(result.lora))
    assert len(generate(prompts[0], "a {} in the box", *loras)) == 1


def test_placeholders_without_a_lora_that_names_them_are_refused(generate, plain, tmp_path):
    whole = {"instance_prompt": "a photo of my dog", "class_prompt": "a photo of a dog"}
    named = change(plain, "subject", token=None, class_name=None, **whole)
    nameless = personalise(change(named, "training", steps=1)).lora
    for more in ((), ("--lora", str(nameless))):
        with pytest.raises(ValueError, match="none that names them") as refused:
            generate("--prompt", "a {token} in the snow", *more)
        assert "loading the model" not in str(refused.value)
    assert not (tmp_path / "images").exists()


def test_the_precision_is_that_of_training_by_default(generate, tiny_model, monkeypatch):
    load, found = sampler.load_stable_diffusion, []

    def seen(*arguments, **options):
        found.append(options["dtype"])
        return load(*arguments, **options)

    monkeypatch.setattr(sampler, "load_stable_diffusion", seen)
    generate("--prompt", "a dog")
    monkeypatch.setattr(sampler, "best_precision", lambda device: "bfloat16")
    generate("--prompt", "a dog")
    generate("--prompt", "a dog", "--precision", "float32")
    assert found == [torch.float32, torch.bfloat16, torch.float32]
