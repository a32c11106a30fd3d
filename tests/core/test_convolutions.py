"""Convolutions as linear maps of their unfolded input, and adapters on them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from cntlora_core import CNTLoRAConfig, get_cntlora_model, match_convolutions
from cntlora_core.activations.collection import collect_moments
from cntlora_core.adapter.inject import adapter_layers
from cntlora_core.closed_form.spectra import principal_subspace
from cntlora_core.layers.attachment import attachment_point, find_attachment_points
from cntlora_core.layers.unfolding import unfolded_rows

GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid", "dilation": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "stride": 2, "padding": 2, "padding_mode": "replicate"},
]


def name_of(options):
    return ",".join(f"{k}={v}" for k, v in options.items())


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", GEOMETRIES, ids=name_of)
def test_unfolded_rows_times_the_kernel_are_what_the_convolution_gives(options):
    conv = nn.Conv2d(3, 5, **options)
    for x in (image(2, 3, 7, 8), image(3, 7, 8), image(2, 7, 8, 3).permute(0, 3, 1, 2)):
        given = conv(x)
        given = given[None] if x.ndim == 3 else given
        wanted = given.permute(0, 2, 3, 1).reshape(-1, 5)
        for chunk in (1, 100, 10**6):
            parts = list(unfolded_rows(conv, x, chunk))
            rows = torch.cat(parts)
            got = rows @ conv.weight.flatten(1).T + conv.bias
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert len(list(unfolded_rows(conv, x, 1))) == given.shape[0] * given.shape[2]


def test_a_chunk_holds_no_more_than_it_may():
    conv = nn.Conv2d(4, 2, 3, padding=1)
    parts = list(unfolded_rows(conv, image(5, 4, 6, 6), chunk_elements=1000))
    assert max(part.numel() for part in parts) <= 1000
    # Whole images where they fit, rather than a line of one at a time.
    assert len(list(unfolded_rows(conv, image(5, 4, 6, 6), chunk_elements=2600))) == 3


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Conv2d(2, 6, **options)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.beside = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.short = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = self.second(h) * self.beside(h) + self.short(h)
        return self.head(h.mean((2, 3)))


NAMES = ["first", "second", "beside", "short", "head"]


def lora_config(**options):
    return LoraConfig(r=3, lora_alpha=6, target_modules=NAMES, **options)


def data():
    return [image(2, 2, 8, 9, seed=i) for i in range(3)]


def test_convolutions_that_look_alike_at_one_tensor_share_its_moment():
    net = Net(kernel_size=3)
    captured = collect_moments(net, find_attachment_points(net, lora_config()), data())
    assert captured.input_of["second"] == captured.input_of["beside"]
    assert captured.input_of["second"] != captured.input_of["short"]
    assert len(captured.moments) == 4
    with torch.no_grad():
        seen = [torch.tanh(net.first(x)) for x in data()]
    rows = torch.cat([nn.functional.unfold(h, 3, padding=1).mT.reshape(-1, 54) for h in seen])
    moment = captured.of("second")
    assert moment.count == len(rows)
    torch.testing.assert_close(
        moment.matrix.double(), rows.double().T @ rows.double() / len(rows), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("options", GEOMETRIES, ids=name_of)
def test_the_first_output_is_the_base_s_and_merging_changes_nothing(options):
    base, x = Net(**options), data()[0]
    before, kernel = base(x), base.second.weight.detach().clone()
    model = get_cntlora_model(base, lora_config(), CNTLoRAConfig(), data())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    layer = adapter_layers(model)["second"]
    assert (layer.get_base_layer().weight - kernel).abs().max() > 1e-3
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1.5)
        adapter_layers(model)["first"].lora_A["default"].weight.mul_(0.5)
    trained = model(x)
    assert (trained - before).abs().max() > 1e-4
    model.merge_adapter()
    torch.testing.assert_close(model(x), trained, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), trained, rtol=1e-3, atol=1e-4)


def test_the_delta_of_a_kernel_is_the_closed_form_of_its_matrix():
    base = Net(kernel_size=3)
    kernel = base.second.weight.detach().flatten(1)
    captured = collect_moments(base, [attachment_point("second", base.second)], data())
    config = CNTLoRAConfig(preserve_output=False, rank_budget="fixed")
    model = get_cntlora_model(base, lora_config(), config, data())
    space = principal_subspace(captured.of("second"), 3)
    v, inverse = space.vectors, 1 / space.values.float()
    norms = (kernel @ v).square().sum(0)
    gain = (norms @ inverse) / (norms @ inverse**2) * inverse - 1
    torch.testing.assert_close(
        adapter_layers(model)["second"].get_delta_weight("default").flatten(1),
        kernel @ v @ torch.diag(gain) @ v.T,
        rtol=1e-3,
        atol=1e-4,
    )


def test_a_saved_adapter_with_dilation_needs_its_geometry_after_loading(tmp_path):
    base, x = Net(kernel_size=3, padding=2, dilation=2, padding_mode="reflect"), data()[0]
    stock = copy.deepcopy(base)
    model = get_cntlora_model(base, lora_config(), CNTLoRAConfig(preserve_output=False), data())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stock, tmp_path)
    weight = adapter_layers(loaded)["first"].lora_A["default"].weight
    match_convolutions(loaded)
    assert adapter_layers(loaded)["first"].lora_A["default"].weight is weight
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    assert match_convolutions(loaded) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_convolutions(dtype):
    base = Net(kernel_size=3, padding=1, padding_mode="reflect").to(dtype)
    x = [batch.to(dtype).to(memory_format=torch.channels_last) for batch in data()]
    before = base(x[0])
    model = get_cntlora_model(base, lora_config(), CNTLoRAConfig(), x)
    torch.testing.assert_close(model(x[0]), before, rtol=0.1, atol=0.05)
    assert 0 < model.cntlora_report.rounding < 0.1


def test_the_guard_says_how_large_the_moment_would_be():
    net = nn.Sequential(nn.Conv2d(40, 8, (7, 5)), nn.Conv2d(8, 4, 1))
    lora = LoraConfig(r=2, target_modules=["0", "1"])
    endless = itertools.repeat(image(1, 40, 9, 9))
    with pytest.raises(ValueError, match=r"1400 features \(40 x 7 x 5\).*1400 x 1400, 7\.\d MB"):
        get_cntlora_model(net, lora, CNTLoRAConfig(max_unfolded_width=1399), endless)
    config = CNTLoRAConfig(max_unfolded_width=1400)
    model = get_cntlora_model(net, lora, config, [image(1, 40, 9, 9)])
    assert model.cntlora_report.rows == {"0": 15, "1": 15}


def test_grouped_convolutions_are_refused_in_words():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(ValueError, match=r"'0', a convolution in 4 groups.*exclude_modules"):
        get_cntlora_model(net, LoraConfig(r=1, target_modules=["0"]), None, [image(1, 4, 5, 5)])
