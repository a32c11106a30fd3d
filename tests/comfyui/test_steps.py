"""LoRAs kept on the way and compared, and a LoRA of ComfyUI's folder that is trained further."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cntlora_core.lora_file.reading import read_lora_tensors

from .conftest import STEPS, Pack, train


def test_steps_are_compared_and_the_best_lora_comes_out(
    pack: Pack, run: SimpleNamespace, tiny_encoders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cntlora_core.metrics import encoders, steps

    monkeypatch.setattr(encoders.mini, "encoder_path", lambda kind: tiny_encoders / kind)
    lora, few = run.trained.args[0], {"per_prompt": 1, "steps": 1, "prompts": "a photo of {token}"}
    node, inputs = (
        "CNTLoRACompareSteps",
        {"model": run.model, "subject": run.subject.args[0], **few},
    )
    for balance, expected in ((lambda *_scores: 0.5, 1), (lambda *_scores: 0.0, STEPS)):
        monkeypatch.setattr(steps.Ends, "balance", balance)
        grid, report, best = pack.run(node, lora=lora, **inputs).args
        assert grid.shape[0] == 1
        assert grid.shape[2] > 4 * 96  # without a LoRA, and three steps
        assert best.label == f"cross, {expected} steps"
        assert report.splitlines()[1].startswith("step 1: DINO ")
    assert "no best step" in report
    with pytest.raises(ValueError, match="save_lora_every above 0"):
        pack.run(node, lora=dict(lora), **inputs)


def test_a_lora_of_the_folder_is_trained_further(
    pack: Pack, run: SimpleNamespace, comfy: Path
) -> None:
    folder = comfy / "models" / "loras"
    shutil.copyfile(run.trained.args[2], folder / "mine.safetensors")
    given = {"model": run.model, "subject": run.subject.args[0], "rank": 8}
    start, _, report = pack.run("CNTLoRAInitialize", from_lora="mine.safetensors", **given).args
    assert "goes on from" in report
    few = {"preview_every": 0, "learning_rate": 0.0, "steps": 1}
    lora, _, path, *_ = train(pack, start, **few).args
    assert lora.label == "from_lora, 1 steps"
    before, after = (
        read_lora_tensors(tensors).layers for tensors in (run.trained.args[0], dict(lora))
    )
    assert all(torch.allclose(before[n].delta(), after[n].delta(), atol=1e-5) for n in before)

    shutil.copyfile(path, folder / "mine.safetensors")  # another file of the same name
    shutil.copyfile(run.trained.args[2], folder / "copy.safetensors")
    other = pack.run("CNTLoRAInitialize", from_lora="copy.safetensors", **given).args[0]
    assert train(pack, other, **few).args[2] == path  # the same file elsewhere is the same run
