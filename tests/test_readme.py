"""The README's Python examples, run as they stand but for the model and the size of the adapter."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples_run(number, tiny_model, photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(photo_folder, tmp_path / "my_dog")
    code = BLOCKS[number]
    if "glosses" in code:
        _require_gloss_data()
        few = "load_gloss_task(train=64, validation=16, batch_size=8)"
        code = code.replace("load_gloss_task()", few)
        code = code.replace("steps=200, evaluate_at=(50, 100, 200)", "steps=2, evaluate_at=(2,)")
    # The example's checkpoint and settings are of full size; the tiny model takes their place.
    code = code.replace('"v1-5-pruned-emaonly.safetensors"', repr(str(tiny_model)))
    code = code.replace("rank=128, alpha=256", "rank=4, alpha=8")
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


def _require_gloss_data() -> None:
    from cntlora_core.tasks.glosses import find_encoder, find_wordnet

    try:
        find_encoder()
        find_wordnet()
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))


def test_files_and_flags_that_the_readme_names_exist():
    from cntlora_core.cli import main

    text = README.read_text("utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (README.parent / target.partition("#")[0]).exists(), target
    for name in ("train", "sample", "inspect", "evaluate", "bench"):
        assert f"cntlora {name}" in text
        with pytest.raises(SystemExit):
            main([name, "--help"])
    assert len(BLOCKS) == 3
