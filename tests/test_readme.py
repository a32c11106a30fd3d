"""The README's Python examples, run as they stand but for the model and the size of the adapter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from .tasks.conftest import SHAPE, make_tokenizer

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
RECIPES = [block for block in BLOCKS if "cntlora_core.tasks" in block]
BLOCKS = [block for block in BLOCKS if block not in RECIPES]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples_run(number, tiny_model, photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(photo_folder, tmp_path / "my_dog")
    code = BLOCKS[number]
    # The example's checkpoint and settings are of full size; the tiny model takes their place.
    code = code.replace('"v1-5-pruned-emaonly.safetensors"', repr(str(tiny_model)))
    code = code.replace("rank=16, alpha=32", "rank=4, alpha=8")
    code = code.replace(
        "result = personalise(settings)",
        "import dataclasses\n"
        "from cntlora_core.diffusion import PriorSettings, TrainingSettings\n"
        "settings = dataclasses.replace(settings, training=TrainingSettings(steps=2), "
        "prior=PriorSettings(num_class_images=2, class_steps=2))\n"
        "result = personalise(settings)",
    )
    exec(compile(code, f"README.md, example {number + 1}", "exec"), {})
    if "personalise" in code:
        assert (tmp_path / "dog_in_the_snow.png").stat().st_size > 100
        assert (tmp_path / "runs/dog/sks-dog-cross.safetensors").is_file()


@pytest.mark.filterwarnings("error:.*pin_memory")
def test_the_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    words = len(tokenizer)
    RobertaModel(RobertaConfig(**SHAPE, vocab_size=words, pad_token_id=1)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows = [
        {"sentence1": "a cat sat", "sentence2": "a dog ran", "label": i % 2, "idx": i}
        for i in range(8)
    ]
    (tmp_path / "rte").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"rte/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (code,) = RECIPES
    code = code.replace('model="roberta-base",', 'model="base", data=".", steps=2, rank=2,')
    exec(compile(code, "README.md, recipe", "exec"), {})
    assert all((tmp_path / f"runs/{m}/metrics.json").is_file() for m in ("lora", "cross", "eva"))


def test_files_and_flags_that_the_readme_names_exist():
    from cntlora_core.cli import main

    text = README.read_text("utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (README.parent / target.partition("#")[0]).exists(), target
    for name in ("train", "sample", "inspect", "evaluate", "bench"):
        assert f"cntlora {name}" in text
        with pytest.raises(SystemExit):
            main([name, "--help"])
    assert len(BLOCKS) == 2
