"""Models that are no transformers models: trained, and what is saved of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cntlora_core.tasks.adapting import save_adapter
from cntlora_core.tasks.run import run_task
from cntlora_core.tasks.settings import Preset, TaskSettings, planned
from cntlora_core.tasks.trainer import Task


def test_a_model_without_an_adapter_is_saved_in_safetensors(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    folder = save_adapter(model, tmp_path, "full")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())


class Tower(nn.Module):
    """As a recipe may have it: no transformers model, and a dict for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.inner(x)))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("method", ["lora_ga", "loftq"])
def test_a_model_without_transformers_outputs_is_trained_and_saved(method, tmp_path):
    if method == "loftq":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    samples = [{"x": torch.randn(8), "labels": torch.tensor(i % 2)} for i in range(16)]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def measure(model, batch):
        logits = model(**batch)["logits"]
        return None, (logits.argmax(1) == batch["labels"]).float()[:, None]

    task = Task(
        "towers", Tower(), samples, {"validation": samples}, collate, measure,
        lambda rows: {"accuracy": float(rows.mean())}, "accuracy",
    )  # fmt: skip
    settings = TaskSettings(
        output=str(tmp_path), method=method, rank=2, steps=2, batch_size=4, device="cpu"
    )
    preset = Preset("a test", "", "", ("inner",), ("head",))
    result = run_task(task, planned(settings, preset))
    assert (result.adapter / "adapter_model.safetensors").exists()
    if method == "loftq":
        stock, base = Tower().state_dict(), load_file(tmp_path / "base" / "model.safetensors")
        assert base.keys() == stock.keys()
