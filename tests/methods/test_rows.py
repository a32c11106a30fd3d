"""Every method that reads data counts the same rows: padding never, whatever the call."""

from __future__ import annotations

import pytest
import torch
from peft import EvaConfig, LoraConfig
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from cntlora_core import CNTLoRAConfig
from cntlora_core.activations.collection import collect_moments
from cntlora_core.layers.attachment import find_attachment_points
from cntlora_core.methods import METHODS, initialize_adapter

READING = [name for name, method in METHODS.items() if method.needs != "nothing"]
ACTIVATIONS = [name for name in READING if METHODS[name].needs == "activations"]
LENGTHS = (7, 4, 5, 3)


def same(first, second):
    """Two initialisations with the same deltas and the same directions."""
    assert first.plan.ranks == second.plan.ranks
    for name, factors in first.plan.factors.items():
        other = second.plan.factors[name]
        if first.method.name == "lora_ga":  # singular vectors, each of any sign
            for a, b in ((factors.down, other.down), (factors.up.T, other.up.T)):
                assert (nn.functional.cosine_similarity(a, b).abs() > 0.999).all(), name
            continue
        torch.testing.assert_close(factors.delta(), other.delta(), rtol=1e-3, atol=1e-4, msg=name)
        torch.testing.assert_close(factors.down, other.down, rtol=1e-2, atol=1e-3, msg=name)


def padded_and_cut(make_data):
    """Batches of four texts of one length each, padded with noise and without it."""
    padded = make_data(batch_size=3, tokens=8, padding_token=9)
    for batch, length in zip(padded, LENGTHS, strict=True):
        batch["attention_mask"][:, length:] = 0
    cut = [
        {k: v if k == "labels" else v[:, :length] for k, v in batch.items()}
        for batch, length in zip(padded, LENGTHS, strict=True)
    ]
    return padded, cut


@pytest.mark.parametrize("name", READING)
def test_padding_changes_no_more_than_if_it_were_cut_off(name, make_base, make_config, make_data):
    padded, cut = (
        initialize_adapter(make_base(), make_config(), name, data)
        for data in padded_and_cut(make_data)
    )
    same(padded, cut)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_function_says_which_tokens_count(name, make_base, make_config, make_data):
    """The first three tokens: as if the layers' inputs were cut, but not the attention."""
    options = {} if name != "eva" else {"eva_config": EvaConfig(rho=1.0)}  # one rank for all
    fixed = CNTLoRAConfig(rank_budget="fixed") if METHODS[name].family == "cntlora" else None
    data = make_data()
    some = torch.zeros(4, 6, dtype=torch.long)
    some[:, :3] = 1
    by_mask = initialize_adapter(
        make_base(),
        make_config(**options),
        name,
        data,
        mask_fn=lambda _: some,
        cntlora_config=fixed,
    )
    rows = []
    base = make_base()
    layer = base.bert.encoder.layer[0].attention.self.query
    handle = layer.register_forward_pre_hook(lambda _m, args: rows.append(args[0][:, :3]))
    with torch.no_grad():
        for batch in data:
            base(**batch)
    handle.remove()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], **options)
    alone = initialize_adapter(nn.Sequential(layer), config, name, rows, cntlora_config=fixed)
    assert by_mask.plan is not None
    assert alone.plan is not None
    factors = by_mask.plan.factors["bert.encoder.layer.0.attention.self.query"]
    other = alone.plan.factors["0"]
    torch.testing.assert_close(factors.delta(), other.delta(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(factors.down, other.down, rtol=1e-2, atol=1e-3)


class Words(nn.Module):
    """Calls its layers by keyword, with what it reads flattened and not."""

    def __init__(self, keywords: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keywords = keywords
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, attention_mask=None):
        if self.keywords:
            return self.second(input=torch.tanh(self.first(input=x)).flatten(0, 1))
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layers_may_be_called_by_keyword_and_read_flattened_tokens(name):
    generator = torch.Generator().manual_seed(3)
    scale = torch.linspace(2, 0.3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    data = [
        {"x": torch.randn(3, 5, 6, generator=generator) * scale, "attention_mask": mask}
        for _ in range(4)
    ]
    config = LoraConfig(r=2, target_modules=["first", "second"])
    same(*(initialize_adapter(Words(keywords), config, name, data) for keywords in (True, False)))


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("name", READING)
def test_a_stream_of_unknown_length(name, make_base, make_config, make_data):
    data = make_data()
    loader = DataLoader(Stream(data), batch_size=None)
    calls = []
    streamed = initialize_adapter(
        make_base(), make_config(), name, loader, progress=lambda *now: calls.append(now)
    )
    same(streamed, initialize_adapter(make_base(), make_config(), name, data))
    assert calls
    if name != "eva":  # its progress is how many layers stand still
        assert calls == [(1, 0), (2, 0), (3, 0)]


def test_moments_of_a_stream(make_base, make_config, make_data):
    base, data = make_base(), make_data()
    points = find_attachment_points(base, make_config())
    streamed = collect_moments(base, points, DataLoader(Stream(data), batch_size=None))
    for a, b in zip(streamed.moments, collect_moments(base, points, data).moments, strict=True):
        assert torch.equal(a.matrix, b.matrix)
