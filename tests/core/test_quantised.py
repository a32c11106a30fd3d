"""Quantised bases, with the real libraries: read where they can be, never rewritten."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cntlora_core import CNTLoRAConfig, get_cntlora_model, initialize_lora_cntlora_weights
from cntlora_core.adapter.inject import adapter_layers

KEEP = CNTLoRAConfig(rank_budget="fixed", preserve_output=False)


def plain() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 32))


def bitsandbytes(kind: str) -> nn.Sequential:
    library = pytest.importorskip("bitsandbytes")
    if kind == "4-bit":
        layer = library.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = library.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(plain()[0].state_dict())
    return nn.Sequential(layer).to("cpu")


def torchao() -> nn.Sequential:
    library = pytest.importorskip("torchao.quantization")
    model = plain()
    library.quantize_(model, library.Int8WeightOnlyConfig())
    return model


MAKERS = {
    "bitsandbytes (4-bit)": lambda: bitsandbytes("4-bit"),
    "bitsandbytes (8-bit)": lambda: bitsandbytes("8-bit"),
    "torchao (Int8Tensor)": torchao,
}
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])


def data():
    return [torch.randn(5, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.filterwarnings("ignore:.*without `get_apply_tensor_subclass`")
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_initialisation_is_that_of_the_dequantised_weight(name, wrapped):
    base, x = MAKERS[name](), data()[0]
    before, weight = base(x), (base(torch.eye(64)) - base(torch.zeros(1, 64))).T.detach()
    assert 1e-3 < (weight - plain()[0].weight).norm() / weight.norm() < 0.2
    if wrapped:
        model = initialize_lora_cntlora_weights(get_peft_model(base, CONFIG), data(), KEEP)
    else:
        model = get_cntlora_model(base, CONFIG, KEEP, data())
    equal = plain()
    equal[0].weight.data = weight
    wanted = get_cntlora_model(equal, CONFIG, KEEP, data()).cntlora_plan.factors["0"].delta()
    layer = adapter_layers(model)["0"]
    delta = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    # bitsandbytes rounds its scales to bfloat16 where the CPU computes with them.
    assert (delta - wanted).norm() < 0.01 * wanted.norm()
    torch.testing.assert_close(model(x), before + x @ delta.T, rtol=0.02, atol=0.02)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", MAKERS)
def test_rewriting_a_quantised_weight_is_refused_before_anything_is_read(name):
    def unread():
        raise AssertionError("read the data before refusing")
        yield

    library, kind = name.split(" ")
    words = rf"'0', but it is quantised by {library} \{kind[:-1]}\).*use preserve_output=False"
    with pytest.raises(ValueError, match=words):
        get_cntlora_model(MAKERS[name](), CONFIG, CNTLoRAConfig(), unread())


def test_a_layer_whose_weight_is_packed_is_refused_in_words():
    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(8, 4, dtype=torch.int32))

    with pytest.raises(ValueError, match="QuantLinear, quantised in a form that cannot be read"):
        get_cntlora_model(nn.Sequential(QuantLinear()), CONFIG, KEEP, data())
