"""Files that are no LoRA are refused in words; what is odd in a LoRA is noted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cntlora_core.inspection.inspect import inspect_lora
from cntlora_core.lora_file.writing import collect_adapter, write_lora_file


def lycoris(kind: str) -> dict[str, Tensor]:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    keys = {
        "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
        "LoKr": ["lokr_w1", "lokr_w2"],
    }[kind]
    return {f"{stem}.alpha": torch.tensor(1.0)} | {f"{stem}.{k}": torch.ones(2, 2) for k in keys}


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_other_methods_are_named(tmp_path: Path, kind: str):
    save_file(lycoris(kind), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"not a LoRA but {kind}"):
        inspect_lora(tmp_path / "x.safetensors")


def test_wrong_files_are_refused_in_words(tmp_path: Path, adapted_unet: Any):
    def refused(path: Path, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            inspect_lora(path)

    with pytest.raises(FileNotFoundError, match="no LoRA and no run"):
        inspect_lora(tmp_path / "absent.safetensors")
    torch.save({"x": torch.ones(2)}, tmp_path / "pickle.safetensors")
    refused(tmp_path / "pickle.safetensors", "is a pickle")
    whole = write_lora_file(tmp_path / "whole.safetensors", collect_adapter(adapted_unet))
    content = whole.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "cut.safetensors", "cut off or damaged")
    save_file({"conv_in.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "not a LoRA: none of its tensors")
    (tmp_path / "vera").mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 2),
        "base_model.model.x.lora_B.weight": torch.ones(2, 1)},
        tmp_path / "vera" / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "vera" / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA"}))
    refused(tmp_path / "vera", "type VERA")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.safetensors").write_bytes(b"")
    refused(tmp_path / "run", "not finished.*--resume")
    shutil.copy(whole, tmp_path / "run" / "a.safetensors")
    (tmp_path / "run" / "state.safetensors").unlink()
    shutil.copy(whole, tmp_path / "run" / "b.safetensors")
    refused(tmp_path / "run", "several files")


def test_half_a_layer_and_values_that_are_not_finite_are_noted(tmp_path: Path):
    stem = "base_model.model.layers.{}.q_proj.lora_{}.weight"
    save_file(
        {
            stem.format(0, "A"): torch.ones(1, 3),
            stem.format(0, "B"): torch.full((4, 1), float("nan")),
            stem.format(1, "A"): torch.ones(1, 3),
            stem.format(2, "A"): torch.ones(1, 3),
            stem.format(2, "B"): torch.zeros(4, 1),
        },
        tmp_path / "x.safetensors",
    )
    found = inspect_lora(tmp_path / "x.safetensors")
    said = " ".join(found.notes)
    assert "layers.1.q_proj has no up factor" in said
    assert "not finite, as layers.0.q_proj" in said
    assert "adapter_config.json" in said
    assert [layer.finite for layer in found.layers] == [False, True]
    assert found.layers[1].norm == 0.0
    json.dumps(found.to_dict(), allow_nan=False)
