"""Choosing the model that is taught."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .conftest import Pack, pictures, subject_of, train


def test_a_replaced_checkpoint_changes_the_fingerprint(
    pack: Pack, comfy: Path, tiny_model: Path
) -> None:
    copy = comfy / "models" / "diffusers" / "copy"
    shutil.copytree(tiny_model, copy)
    fingerprint = pack.nodes["CNTLoRALoadModel"].fingerprint_inputs
    tiny = fingerprint("diffusers/tiny", "float32")
    assert fingerprint("diffusers/copy", "float32") == tiny
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text("utf-8") + "\n", "utf-8")
    assert fingerprint("diffusers/copy", "float32") != tiny
    assert fingerprint("diffusers/tiny", "bfloat16") != tiny


def test_the_small_model_is_among_the_checkpoints(pack: Pack) -> None:
    widgets = pack.module("widgets")
    assert widgets.SMALL_MODEL in widgets.model_names()
    assert pack.nodes["CNTLoRALoadModel"].validate_inputs(widgets.SMALL_MODEL) is True


def test_the_small_model_is_refused_for_ksampler_in_words(pack: Pack) -> None:
    small = pack.module("widgets").SMALL_MODEL
    model = pack.run("CNTLoRALoadModel", checkpoint=small).args[0]
    with pytest.raises(ValueError, match=r"generate images with Generate Images"):
        pack.run("CNTLoRAOpenModel", model=model)


def test_a_folder_s_text_encoder_has_the_names_that_comfyui_looks_for(
    pack: Pack, comfy: Path, tmp_path: Path
) -> None:
    """ComfyUI leaves a text encoder of other names at random weights, with a line in the log."""
    found = pack.module("load")._text_weights(comfy / "models/diffusers/tiny", "text_encoder")
    assert "text_model.final_layer_norm.weight" in found
    part = tmp_path / "text_encoder_2"
    part.mkdir()
    (part / "config.json").write_text("{}")
    save_file(
        {"text_projection.weight": torch.ones(2), "text_model.x": torch.zeros(2)},
        part / "model.safetensors",
    )
    names = pack.module("load")._text_weights(tmp_path, part.name).keys()
    assert names == {"text_projection.weight", "text_model.x"}


def test_a_wrong_checkpoint_is_said_when_it_is_queued(pack: Pack, comfy: Path) -> None:
    path = comfy / "models" / "checkpoints" / "sd2.safetensors"
    save_file({"cond_stage_model.model.x": torch.zeros(1)}, path)
    validate = pack.nodes["CNTLoRALoadModel"].validate_inputs
    assert "Stable Diffusion 2.x" in validate("sd2.safetensors")
    assert "no checkpoint" in validate("../../etc/passwd")


def checkpoint_with(*marks: str) -> dict[str, torch.Tensor]:
    """What is taken for a model of Stable Diffusion 1.5, and empty tensors of these names."""
    kinds = ("model.diffusion_model.input_blocks.x", "first_stage_model.x",
             "cond_stage_model.transformer.x")  # fmt: skip
    return {**{name: torch.zeros(1) for name in kinds}, **{m: torch.tensor([]) for m in marks}}


@pytest.fixture
def patched(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What *Open Model for KSampler* asks ComfyUI's ModelSamplingDiscrete for; None: nothing."""

    class ModelSamplingDiscrete:
        def patch(self, model: None, sampling: str, zsnr: bool) -> tuple[tuple[str, bool]]:
            return ((sampling, zsnr),)

    module = ModuleType("comfy_extras.nodes_model_advanced")
    module.ModelSamplingDiscrete = ModelSamplingDiscrete  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "comfy_extras", ModuleType("comfy_extras"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(pack.module("load"), "_opened", lambda _model: (None, None, None))

    def opened(name: str, **widgets: Any) -> Any:
        model = pack.run("CNTLoRALoadModel", checkpoint=name, **widgets).args[0]
        return pack.run("CNTLoRAOpenModel", model=model).args[0]

    return opened


@pytest.mark.parametrize(
    ("marks", "header", "chosen", "expected"),
    [
        ((), None, "model's own", None),
        ((), None, "v_prediction", ("v_prediction", False)),
        (("v_pred", "ztsnr"), None, "model's own", ("v_prediction", True)),
        (("v_pred", "ztsnr"), None, "epsilon", ("eps", False)),
        ((), "v", "model's own", ("v_prediction", False)),
    ],
)
def test_ksampler_goes_by_what_the_training_goes_by(
    comfy: Path, patched: Any, tmp_path: Path, marks, header, chosen, expected
) -> None:
    """ComfyUI reads a file's ``v_pred``, but no header, no scheduler and no word of a person."""
    name = f"{tmp_path.name}.safetensors"
    header = {} if header is None else {"modelspec.prediction_type": header}
    save_file(checkpoint_with(*marks), comfy / "models" / "checkpoints" / name, header)
    assert patched(name, prediction_type=chosen) == expected


def test_ksampler_goes_by_a_folder_s_scheduler(comfy: Path, patched: Any, tiny_model: Path) -> None:
    folder = comfy / "models" / "diffusers" / "velocity"
    shutil.copytree(tiny_model, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text("utf-8")) | {"prediction_type": "v_prediction"})
    )
    assert patched("diffusers/tiny") is None
    assert patched("diffusers/velocity") == ("v_prediction", False)


def test_what_the_model_predicts_goes_into_the_training(pack: Pack) -> None:
    chosen = {"checkpoint": "diffusers/tiny", "prediction_type": "v_prediction"}
    model = pack.run("CNTLoRALoadModel", **chosen).args[0]
    subject = subject_of(pack, images=[pictures()]).args[0]
    start = pack.run("CNTLoRAInitialize", model=model, subject=subject, method="lora", rank=2).args[
        0
    ]
    trained = train(pack, start, preview_every=0, steps=1)
    assert trained.args[0].metadata["modelspec.prediction_type"] == "v"
    others = pack.run("CNTLoRAClassImages", model=model, subject=subject, count=1, steps=1).args[1]
    model = pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny").args[0]
    plain = pack.run("CNTLoRAClassImages", model=model, subject=subject, count=1, steps=1).args[1]
    assert not torch.equal(others, plain)


def test_an_edm_model_is_refused_when_it_is_queued(pack: Pack, comfy: Path) -> None:
    path = comfy / "models" / "checkpoints" / "edm.safetensors"
    save_file(checkpoint_with("edm_mean", "edm_std"), path)
    said = pack.nodes["CNTLoRALoadModel"].validate_inputs("edm.safetensors")
    assert "this is an EDM model" in said
