"""Second moments and plans that are saved, loaded and used again give the same adapters."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

from cntlora_core import (
    AdapterPlan,
    CapturedMoments,
    CNTLoRAConfig,
    collect_moments,
    find_attachment_points,
    get_cntlora_model,
)
from cntlora_core.adapter.inject import inject_adapter

DOCUMENT = Path(__file__).parents[2] / "docs" / "any_model.md"


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"query": nn.Linear(12, 9), "conv": nn.Conv2d(3, 6, 3)})


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(30, 12), torch.randn(2, 3, 8, 8)) for _ in range(2)]


LORA = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "conv"])


def run(model, batch):
    model["query"](batch[0])
    model["conv"](batch[1])


def factors_of(model) -> dict[str, torch.Tensor]:
    return model.cntlora_plan.tensors()


@pytest.mark.parametrize(
    "config",
    [
        CNTLoRAConfig(),
        CNTLoRAConfig(constraint="self", rank_budget="fixed"),
        CNTLoRAConfig(constraint="shift", unit="mean", damping=0.1),
    ],
)
def test_saved_moments_stand_for_the_data(base, batches, config, tmp_path):
    expected = get_cntlora_model(copy.deepcopy(base), LORA, config, batches, forward_fn=run)
    points = find_attachment_points(base, LORA)
    path = tmp_path / "moments.safetensors"
    collect_moments(base, points, batches, forward_fn=run).save(path)
    moments = CapturedMoments.load(path)
    for _ in range(2):  # the moments are not used up
        model = get_cntlora_model(copy.deepcopy(base), LORA, config, moments=moments)
        found, wanted = factors_of(model), factors_of(expected)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert model.cntlora_report.rows == expected.cntlora_report.rows


def test_a_saved_plan_gives_the_same_model(base, batches, tmp_path):
    model = get_cntlora_model(copy.deepcopy(base), LORA, None, batches, forward_fn=run)
    plan = AdapterPlan.load(model.cntlora_plan.save(tmp_path / "plan.safetensors"))
    assert (plan.ranks, plan.filled) == (model.cntlora_plan.ranks, model.cntlora_plan.filled)
    again, _ = inject_adapter(base, LORA, plan)
    for (name, one), (_, two) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_moments_of_other_layers_are_refused(base, batches):
    moments = collect_moments(base, find_attachment_points(base, LORA), batches, forward_fn=run)
    other = nn.ModuleDict({"query": nn.Linear(10, 9), "conv": nn.Conv2d(3, 6, 3)})
    with pytest.raises(ValueError, match="one of width 12 for 'query', which reads 10 features"):
        get_cntlora_model(other, LORA, moments=moments)
    with pytest.raises(ValueError, match="either the data or its second moments"):
        get_cntlora_model(base, LORA, None, batches, moments=moments)
    with pytest.raises(ValueError, match="either the data or its second moments"):
        get_cntlora_model(base, LORA, None)


@pytest.mark.parametrize("damage", ["cut", "other"])
@pytest.mark.parametrize("kind", [CapturedMoments, AdapterPlan])
def test_a_damaged_file_is_named(base, batches, tmp_path, kind, damage):
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    collect_moments(base, find_attachment_points(base, LORA), batches, forward_fn=run).save(path)
    get_cntlora_model(base, LORA, None, batches, forward_fn=run).cntlora_plan.save(other)
    path, other = (path, other) if kind is CapturedMoments else (other, path)
    path.write_bytes(path.read_bytes()[:-8] if damage == "cut" else other.read_bytes())
    with pytest.raises(ValueError, match=r"(one|two)\.safetensors cannot be read as"):
        kind.load(path)


def test_the_documented_recipe_runs(base, batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = DOCUMENT.read_text("utf-8")
    (recipe,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if ".load(" in b)
    layer = nn.Sequential(base["query"])
    lora_config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    names = {"base": layer, "lora_config": lora_config, "dataloader": [b[0] for b in batches]}
    exec(recipe, names)
    one, two = (AdapterPlan.load(f"{c}.safetensors").tensors() for c in ("cross", "self"))
    assert one.keys() == two.keys()
    assert not torch.equal(one["0.up"], two["0.up"])
