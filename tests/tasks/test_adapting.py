"""What is saved of a model that is no transformers model."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from cntlora_core.tasks.adapting import save_adapter


def test_a_model_without_an_adapter_is_saved_in_safetensors(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    folder = save_adapter(model, tmp_path, "full")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())
