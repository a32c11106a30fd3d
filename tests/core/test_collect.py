"""Batches of any form, padding, and points that are called in any way or never."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from peft import LoraConfig
from torch import nn

from cntlora_core import CNTLoRAConfig, get_cntlora_model
from cntlora_core.activations.collection import collect_moments
from cntlora_core.layers.attachment import find_attachment_points


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.flat, self.pooled = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, attention_mask=None):
        h = self.tokens(input=x)
        h = self.flat(h.reshape(-1, 3)).reshape(h.shape)
        return self.pooled(h.mean(1))


def points_of(model):
    return find_attachment_points(model, LoraConfig(target_modules=["tokens", "flat", "pooled"]))


def batches():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, 5, 3, generator=generator) for _ in range(2)]


MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
Pair = namedtuple("Pair", ["x", "attention_mask"])


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, MASK],
        lambda x: Pair(x, None),
        lambda x: {"x": x},
        lambda x: UserDict(x=x),
    ],
)
def test_tensors_sequences_and_mappings_give_the_same(form):
    model = Model()
    wanted = collect_moments(model, points_of(model), batches())
    got = collect_moments(model, points_of(model), [form(x) for x in batches()])
    for a, b in zip(got.moments, wanted.moments, strict=True):
        assert torch.equal(a.matrix, b.matrix)
    assert got.of("tokens").count == 20
    assert got.of("pooled").count == 4


def check_masked(captured, rows):
    moment = captured.of("tokens")
    assert moment.count == len(rows)
    wanted = rows.double().T @ rows.double() / len(rows)
    torch.testing.assert_close(moment.matrix.double(), wanted, rtol=1e-5, atol=1e-6)
    assert captured.of("flat").count == len(rows)
    assert captured.of("pooled").count == 4


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding_is_left_out_by_the_attention_mask(dtype):
    model = Model()
    given = [{"x": x, "attention_mask": MASK.to(dtype)} for x in batches()]
    captured = collect_moments(model, points_of(model), given)
    check_masked(captured, torch.cat([x[MASK.bool()] for x in batches()]))


def test_padding_is_left_out_by_a_function_for_batches_of_any_form():
    model = Model()
    given = [(x, MASK) for x in batches()]
    captured = collect_moments(model, points_of(model), given, mask_fn=lambda batch: batch[1])
    check_masked(captured, torch.cat([x[MASK.bool()] for x in batches()]))
    captured = collect_moments(model, points_of(model), batches(), mask_fn=lambda x: x[..., 0] > 0)
    check_masked(captured, torch.cat([x[x[..., 0] > 0] for x in batches()]))
    got = get_cntlora_model(
        Model(),
        LoraConfig(r=2, target_modules=["tokens"]),
        CNTLoRAConfig(),
        given,
        mask_fn=lambda batch: batch[1],
    )
    assert got.cntlora_report.rows == {"tokens": 14}


def test_what_stands_in_the_padding_does_not_matter():
    model = Model()
    given = [{"x": x, "attention_mask": MASK} for x in batches()]
    spoiled = [{**b, "x": b["x"].masked_fill(MASK[..., None] == 0, float("nan"))} for b in given]
    points = [p for p in points_of(model) if p.name == "tokens"]
    a, b = (collect_moments(model, points, some).of("tokens") for some in (given, spoiled))
    assert torch.equal(a.matrix, b.matrix)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.tensor([[0.0, -1e4]]), "values from -10000 to 0"),
        (torch.ones(2, 1, 5, 5), "got shape"),
    ],
)
def test_masks_that_mean_something_else_are_refused(mask, words):
    model = Model()
    with pytest.raises(ValueError, match=words):
        collect_moments(model, points_of(model), batches(), mask_fn=lambda _: mask)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 2, 3, 3)])
def test_inputs_of_any_number_of_dimensions(shape):
    model = nn.Sequential(nn.Linear(3, 2))
    points = find_attachment_points(model, LoraConfig(target_modules=["0"]))
    x = torch.randn(shape)
    moment = collect_moments(model, points, [x]).of("0")
    rows = x.reshape(-1, 3)
    assert moment.count == len(rows)
    torch.testing.assert_close(moment.matrix, rows.T @ rows / len(rows))


def test_one_layer_called_several_times_counts_each_call():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x))) + self.other(x)

    model, x = Loop(), torch.randn(4, 3)
    points = find_attachment_points(model, LoraConfig(target_modules=["layer", "other"]))
    captured = collect_moments(model, points, [x])
    with torch.no_grad():
        rows = torch.cat([x, torch.tanh(model.layer(x))])
    torch.testing.assert_close(captured.of("layer").matrix, rows.T @ rows / 8)
    torch.testing.assert_close(captured.of("other").matrix, x.T @ x / 4)


def test_points_that_are_never_called_are_initialised_plainly_and_are_reported():
    class Half(Model):
        def forward(self, x):
            return self.tokens(x)

    lora = LoraConfig(r=2, target_modules=["tokens", "pooled"])
    model = get_cntlora_model(Half(), lora, CNTLoRAConfig(rank_budget="fixed"), batches())
    report = model.cntlora_report
    assert report.never_called == ["pooled"]
    assert report.filled == {"pooled": 2}
    assert "1 of 2 points never called, for example 'pooled'" in report.summary()


def test_a_forward_that_runs_another_model_is_refused():
    model, other = Model(), Model()
    with pytest.raises(ValueError, match="forward_fn must run the very model"):
        collect_moments(model, points_of(model), batches(), forward_fn=lambda _m, x: other(x))
