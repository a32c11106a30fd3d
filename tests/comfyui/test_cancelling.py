"""Cancelling before the training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .conftest import Pack, pictures, subject_of

CANCELLED_IN = {
    "generating class images": ("CNTLoRAClassImages", {"count": 2, "steps": 2, "images_seed": 9}),
    "encoding photos": ("CNTLoRAInitialize", {"rank": 4, "passes": 1}),
    "reading activations": ("CNTLoRAInitialize", {"rank": 4, "passes": 3}),
    "looking at pictures (DINO)": ("CNTLoRAEvaluate", {"prompts": "a dog"}),
}


@pytest.mark.parametrize("stage", CANCELLED_IN)
def test_cancelling_stops_at_once_and_leaves_nothing_half_written(
    pack: Pack,
    run: SimpleNamespace,
    comfy: Path,
    tiny_encoders: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    from comfy import model_management  # pyright: ignore[reportMissingImports]

    from cntlora_core.metrics import encoders

    kind, settings = CANCELLED_IN[stage]
    inputs = {"subject": subject_of(pack, images=[pictures(4, 44 + len(stage))]).args[0]}
    inputs |= {"images": pictures(40, 16)} if "DINO" in stage else {"model": run.model}
    monkeypatch.setattr(encoders.mini, "encoder_path", lambda kind: tiny_encoders / kind)
    reporter = pack.module("runtime").HostReporter
    plain, after = reporter._say, []

    def press_cancel(self: Any, told: str, done: int, total: int, values: dict) -> None:
        plain(self, told, done, total, values)
        if after or (told == stage and 0 < done + values.get("within", 0.0) < total):
            after.append(told)
            model_management.interrupt_current_processing()

    monkeypatch.setattr(reporter, "_say", press_cancel)
    with pytest.raises(model_management.InterruptProcessingException):
        pack.run(kind, **inputs, **settings)
    assert after == [stage]  # nothing more was done than the step at which it was pressed
    assert not model_management.processing_interrupted()
    assert not [path for path in comfy.rglob("*.tmp") if path.is_file()]
    monkeypatch.setattr(reporter, "_say", plain)
    again = pack.run(kind, **inputs, **settings)
    assert again.ui["images"]
