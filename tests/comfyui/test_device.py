"""ComfyUI's device and its memory settings are those of the training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cntlora_core.runtime.precision import best_precision

from .conftest import Pack, pictures, subject_of, train


@pytest.fixture
def manage(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what ComfyUI's memory management says; its calls are noted in ``said``."""
    runtime, said = pack.module("runtime"), []

    def set_to(state: str = "NORMAL_VRAM", device: str = "cuda", **answers: bool) -> None:
        host = runtime.model_management
        monkeypatch.setattr(host, "vram_state", SimpleNamespace(name=state))
        monkeypatch.setattr(host, "get_torch_device", lambda: torch.device(device))
        for name, answer in answers.items():
            monkeypatch.setattr(host, name, lambda _device, answer=answer: answer)
        for name in ("free_memory", "unload_all_models", "soft_empty_cache"):
            monkeypatch.setattr(host, name, lambda *rest, name=name: said.append((name, *rest)))

    return SimpleNamespace(set_to=set_to, said=said, runtime=runtime)


@pytest.mark.parametrize(
    ("bf16", "fp16", "expected"),
    [(True, True, "bfloat16"), (False, True, "float16"), (False, False, "float32")],
)
def test_the_number_format_is_what_comfyui_finds_its_card_good_at(
    pack: Pack, manage: Any, bf16: bool, fp16: bool, expected: str
) -> None:
    manage.set_to(should_use_bf16=bf16, should_use_fp16=fp16)
    model = pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny").args[0]
    assert model.precision == expected
    manage.set_to(device="cpu")
    assert pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny").args[0].precision == "float32"
    chosen = pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny", precision="float16")
    assert chosen.args[0].precision == "float16"


def test_highvram_keeps_what_there_is_room_for(manage: Any) -> None:
    manage.set_to("HIGH_VRAM")
    manage.runtime.run_heavy(lambda _reporter: None)
    name, size, device = manage.said[0]
    assert (name, device) == ("free_memory", torch.device("cuda"))
    assert size == manage.runtime.ROOM_FOR_TRAINING
    assert "unload_all_models" not in [name for name, *_ in manage.said]
    manage.set_to("NORMAL_VRAM")
    manage.said.clear()
    manage.runtime.run_heavy(lambda _reporter: None)
    assert manage.said[0] == ("unload_all_models",)


def test_lowvram_trains_with_gradient_checkpointing(manage: Any) -> None:
    for state, expected in (("NORMAL_VRAM", False), ("LOW_VRAM", True), ("NO_VRAM", True)):
        manage.set_to(state)
        assert manage.runtime.spares_memory() is expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nodes_train_on_a_gpu(pack: Pack) -> None:
    model = pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny").args[0]
    assert model.precision == best_precision(torch.device("cuda"))
    subject = subject_of(pack, images=[pictures(3)]).args[0]
    initialized = pack.run("CNTLoRAInitialize", model=model, subject=subject, rank=2).args[0]
    lora = train(pack, initialized).args[0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in lora.values())
