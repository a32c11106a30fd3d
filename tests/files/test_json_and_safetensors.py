"""What is written is what is read: any text as JSON, any tensor as safetensors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from cntlora_core.runtime.files import save_safetensors_atomic, write_json_atomic

from .conftest import names


@pytest.mark.parametrize(
    "value", [{"loss": float("nan")}, [float("inf")], {"a": object()}, {(1, 2): 3}]
)
def test_json_that_is_not_json_touches_nothing(tmp_path, value):
    target = write_json_atomic(tmp_path / "a.json", {"é": [1, "x"]})
    with pytest.raises((TypeError, ValueError), match=r"a\.json"):
        write_json_atomic(target, value)
    assert json.loads(target.read_text(encoding="utf-8")) == {"é": [1, "x"]}
    assert names(tmp_path) == ["a.json"]


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(), max_size=20))
def test_json_keeps_any_text(text):
    with tempfile.TemporaryDirectory() as folder:
        path = write_json_atomic(Path(folder) / "a.json", {text: text})
        assert json.loads(path.read_text(encoding="utf-8")) == {text: text}


def test_safetensors_views_aliases_and_metadata(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "all": base,
        "again": base,
        "row": base[1],
        "turned": base.T,
        "half": base.to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = save_safetensors_atomic(tensors, tmp_path / "a.safetensors", {"who": "é"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"who": "é"}
    with pytest.raises(TypeError, match=r"json\.dumps"):
        save_safetensors_atomic(tensors, path, {"rank": 4})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"'a' must be a torch\.Tensor"):
        save_safetensors_atomic({"a": [1]}, path)  # type: ignore[dict-item]
    assert load_file(path).keys() == tensors.keys()
