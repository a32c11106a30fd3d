"""The inspect command, a run of train under it, and the lines of its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cntlora_core.cli import main
from cntlora_core.figures.plots import lines_by_depth
from cntlora_core.inspection.inspect import inspect_lora
from cntlora_core.lora_file.writing import collect_adapter, write_lora_file


def test_the_command_prints_draws_and_leaves_other_files_alone(
    tmp_path: Path, adapted_unet: Any, capsys: pytest.CaptureFixture[str]
):
    file = write_lora_file(tmp_path / "my dog.safetensors", collect_adapter(adapted_unet))
    (tmp_path / "ranks.png").write_text("mine")
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    for text in ("kohya", "down_blocks.0.attentions.0", "stable rank", "attachment points"):
        assert text in printed
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == [
        "my dog.inspect-ranks.png",
        "my dog.inspect-spectra.png",
        "ranks.png",
    ]
    assert (tmp_path / "ranks.png").read_text() == "mine"
    assert main(["inspect", str(file), "--json", "--output", str(tmp_path / "new folder")]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["layout"] == "kohya"
    assert described["layers"][0]["singular_values"]
    assert all(Path(p).parent.name == "new folder" and Path(p).stat().st_size > 1000
        for p in described["pictures"])  # fmt: skip
    assert main(["inspect", str(tmp_path / "ranks.png")]) == 1
    assert "no safetensors file" in capsys.readouterr().err


@pytest.mark.plots
@pytest.mark.thorough
def test_a_run_of_train(tiny_model: Path, photo_folder: Path, tmp_path: Path, capsys: Any):
    from cntlora_core.diffusion import (
        AdapterSettings,
        JobSettings,
        OutputSettings,
        PriorSettings,
        SubjectSettings,
        TrainingSettings,
        personalise,
    )

    result = personalise(
        JobSettings(
            model=str(tiny_model),
            subject=SubjectSettings(images=str(photo_folder), token="sks", class_name="dog"),
            output=OutputSettings(output=str(tmp_path / "run")),
            prior=PriorSettings(prior_weight=0.0, cache=str(tmp_path / "cache")),
            adapter=AdapterSettings(rank=4, alpha=8),
            training=TrainingSettings(steps=1, device="cpu"),
        )
    )
    before = (tmp_path / "run" / "ranks.png").read_bytes()
    found = inspect_lora(tmp_path / "run")
    assert found.path == result.lora
    assert found.ranks == result.export.trained_ranks
    assert {layer.name: layer.rank for layer in found.layers} == result.export.ranks
    assert found.method == "cross"
    assert found.run is not None
    assert found.run["steps"] == 1
    assert inspect_lora(result.lora).run == found.run
    assert main(["inspect", str(tmp_path / "run"), "--model", str(tiny_model)]) == 0
    assert "trained ranks" in capsys.readouterr().out
    assert (tmp_path / "run" / "ranks.png").read_bytes() == before
    assert len(list((tmp_path / "run").glob("*.inspect-*.png"))) == 2


def test_lines_of_the_rank_picture():
    names = [
        "lora_te2_text_model_encoder_layers_10_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_2_self_attn_q_proj",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k",
        "model.layers.1.mlp.up_proj",
    ]
    assert lines_by_depth({name: i for i, name in enumerate(names)}) == {
        "te2.text_model_encoder_layers.self_attn": {"q": [1, 0]},
        "UNet self-attention": {"out": [3, 2]},
        "UNet cross-attention": {"k": [4]},
        "model.layers.mlp": {"up_proj": [5]},
    }
