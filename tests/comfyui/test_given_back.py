"""The memory of a run, which is asked for and given back."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import Pack, pictures, subject_of, train


def live_bytes() -> int:
    """What the tensors that Python knows of hold."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their type
        for found in gc.get_objects():
            if isinstance(found, Tensor) and found.device.type == "cpu":
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.thorough
def test_models_have_gone_when_caches_are_emptied_and_later(
    pack: Pack, run: SimpleNamespace, tiny_encoders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from cntlora_core.metrics import encoders

    monkeypatch.setattr(encoders.mini, "encoder_path", lambda kind: tiny_encoders / kind)
    management = pack.module("runtime").model_management
    subject = subject_of(pack, images=[pictures(2, 52)]).args[0]
    few = {"model": run.model, "prompts": "a dog", "steps": 1}

    def generate(lora: Any) -> None:
        pack.run("CNTLoRASample", lora=lora, **few)
        pack.run("CNTLoRACompare", lora_1=lora, seeds="0", **few)
        pack.run("CNTLoRAEvaluate", images=pictures(1, 16), subject=subject, prompts="a dog")

    generate(run.trained.args[0])  # what libraries keep for themselves
    before = live_bytes()
    models: list[int] = []

    def count_models(force: bool = False) -> None:
        models.append(sum(issubclass(type(found), nn.Module) for found in gc.get_objects()))

    monkeypatch.setattr(management, "soft_empty_cache", count_models)
    given = {"model": run.model, "subject": subject}
    others = pack.run("CNTLoRAClassImages", count=1, steps=1, **given)
    initialized = pack.run("CNTLoRAInitialize", rank=4, passes=1, **given)
    trained = train(pack, initialized.args[0], others.args[0], name="counted", steps=1)
    generate(trained.args[0])
    assert len(models) >= 2 * 6  # before and after each
    assert set(models) == {models[0]}
    del others, initialized, trained
    weights = sum(path.stat().st_size for path in run.model.path.rglob("*.safetensors"))
    assert live_bytes() - before < 0.01 * weights


def test_memory_is_asked_for_and_given_back_also_after_an_error(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pack.module("runtime")
    said: list[str] = []
    for name in ("unload_all_models", "soft_empty_cache"):
        monkeypatch.setattr(runtime.model_management, name, lambda name=name: said.append(name))

    def fail(reporter: Any) -> None:
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        hold_and_fail()

    def hold_and_fail() -> None:
        large = torch.zeros(3)
        raise ValueError(f"holding {large}")

    with torch.inference_mode(), pytest.raises(ValueError, match="holding") as caught:
        runtime.run_heavy(fail)
    assert "large" not in caught.traceback[-1].frame.f_locals
    assert said == ["unload_all_models", "soft_empty_cache", "soft_empty_cache"]


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB"), MemoryError),
    ],
)
def test_lack_of_memory_is_said_with_what_to_lower(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, raised: Exception, shown: type[Exception]
) -> None:
    runtime = pack.module("runtime")
    for name in ("unload_all_models", "soft_empty_cache"):
        monkeypatch.setattr(runtime.model_management, name, lambda: None)

    def fail(reporter: Any) -> None:
        raise raised

    with pytest.raises(shown, match=r"lower the resolution.*memory"):
        runtime.run_heavy(fail)
