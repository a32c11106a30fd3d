"""Each layer's moments are those of its own tokens: encoder's, decoder's or image's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
)

from cntlora_core import CNTLoRAConfig, get_cntlora_model
from cntlora_core.activations.collection import collect_moments
from cntlora_core.layers.attachment import find_attachment_points

PAD, END = 0, 1
# As many tokens in the encoder as in the decoder: no shape tells them apart.
READ = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
WRITTEN = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
BERT = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


def t5(cls=T5ForConditionalGeneration):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    return cls(T5Config(vocab_size=20, pad_token_id=PAD, decoder_start_token_id=PAD, **sizes))


def bart(cls=BartForConditionalGeneration):
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": END}
    return cls(
        BartConfig(vocab_size=20, d_model=8, max_position_embeddings=16, **tokens, **sizes, **heads)
    )


def two_berts():
    torch.manual_seed(0)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**BERT), BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    )
    config.decoder_start_token_id, config.pad_token_id = 2, PAD
    return EncoderDecoderModel(config)


def text(mask, seed=1):
    ids = torch.randint(3, 20, mask.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(mask.bool(), ids, PAD)


def labels(ignored=-100):
    return torch.where(WRITTEN.bool(), text(WRITTEN, 2), ignored)


def points_of(model):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return find_attachment_points(model, LoraConfig(target_modules=names))


def inputs_of(model, points, batch):
    """What each point reads, through hooks of the test's own."""
    seen = {}
    handles = [
        p.module.register_forward_pre_hook(
            lambda _module, args, name=p.name: seen.setdefault(name, args[0].detach())
        )
        for p in points
    ]
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return seen


def check(model, batch, mask_of, mask_fn=None):
    """The moments against those worked out in float64 under the mask that each name has."""
    points = points_of(model)
    seen = inputs_of(model, points, batch)
    captured = collect_moments(model, points, [batch], mask_fn=mask_fn)
    assert seen
    for name, x in seen.items():
        mask = mask_of(name)
        rows = (x[mask.bool()] if mask is not None else x.reshape(-1, x.shape[-1])).double()
        moment = captured.of(name)
        assert moment.count == len(rows), name
        torch.testing.assert_close(
            moment.matrix.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6, msg=name
        )


def of_t5(read, written):
    def mask_of(name):
        across = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        return read if name.startswith("encoder") or across else written

    return mask_of


def of_bart(read, written):
    def mask_of(name):
        across = name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
        return read if ".encoder." in name or across else written

    return mask_of


@pytest.mark.parametrize("ignored", [-100, PAD])
@pytest.mark.parametrize(("make", "of"), [(t5, of_t5), (bart, of_bart)])
def test_encoder_and_decoder_have_masks_of_their_own(make, of, ignored):
    batch = {"input_ids": text(READ), "attention_mask": READ, "labels": labels(ignored)}
    check(make(), batch, of(READ, WRITTEN))


@pytest.mark.parametrize(("make", "of"), [(t5, of_t5), (bart, of_bart)])
def test_a_decoder_mask_goes_before_labels(make, of):
    own = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": text(READ), "attention_mask": READ, "labels": labels()}
    check(make(), {**batch, "decoder_attention_mask": own}, of(READ, own))


def test_a_decoder_without_labels_leaves_out_its_padding_but_not_its_start():
    ids = text(WRITTEN, 2)
    ids[:, 0] = PAD  # T5 starts from it
    batch = {"input_ids": text(READ), "attention_mask": READ, "decoder_input_ids": ids}
    check(t5(T5Model), batch, of_t5(READ, WRITTEN))


def test_padding_of_the_decoder_is_left_out_though_the_encoder_has_none():
    batch = {"input_ids": text(torch.ones_like(READ)), "labels": labels()}
    check(t5(), batch, of_t5(None, WRITTEN))


def test_labels_of_whole_texts_say_nothing_about_tokens():
    ids = text(READ)
    ids[0, -1] = ids[1, 1] = END
    batch = {"input_ids": ids, "attention_mask": READ, "labels": torch.tensor([0, 1])}
    moved = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])  # the decoder reads a start first
    heads = ("classification_head.dense", "classification_head.out_proj")
    own = of_bart(READ, moved)
    check(
        bart(BartForSequenceClassification),
        batch,
        lambda name: None if name in heads else own(name),
    )


def test_two_models_joined_as_encoder_and_decoder():
    batch = {"input_ids": text(READ), "attention_mask": READ, "labels": labels()}
    # This model makes a mask for its decoder: the start and every token that is no padding.
    written = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def mask_of(name):
        across = name.endswith(("crossattention.self.key", "crossattention.self.value"))
        if name.endswith("pooler.dense"):
            return None
        return READ if name.startswith("encoder.") or across else written

    check(two_berts(), batch, mask_of)


def test_masks_that_a_function_gives_for_both():
    read, written = 1 - READ, 1 - WRITTEN
    read[0, 0] = 1
    batch = {"input_ids": text(READ), "attention_mask": READ, "labels": labels()}
    given = {"attention_mask": read, "decoder_attention_mask": written}
    check(t5(), batch, of_t5(read, written), lambda _: given)
    check(t5(), batch, of_t5(read, WRITTEN), lambda _: read)
    check(t5(), batch, of_t5(READ, written), lambda _: {"decoder_attention_mask": written})
    check(t5(), batch, of_t5(None, None), lambda _: None)
    del batch["attention_mask"]
    check(t5(), batch, of_t5(read, WRITTEN), lambda _: read)
    with pytest.raises(ValueError, match=r"under 'attention_mask' and .* got 'encoder'"):
        check(t5(), batch, None, lambda _: {"encoder": read})


def test_image_tokens_are_not_masked_as_text():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 4, "patch_size": 2, **heads}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={**vision, **sizes, "projection_dim": 8},
            text_config={"model_type": "llama", "vocab_size": 20, **sizes, **heads},
            image_token_index=19,
        )
    )
    # Two pictures of four patches and a class token: the shape of two texts of five tokens.
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    ids = torch.tensor([[19, 19, 19, 19, 5], [PAD, 19, 19, 19, 19]])
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 4, 4)}
    of_image = ("vision", "projector")
    check(model, batch, lambda name: None if any(word in name for word in of_image) else mask)
    del batch["attention_mask"]
    check(
        model,
        batch,
        lambda name: None if any(word in name for word in of_image) else mask,
        lambda _: mask,
    )


def test_image_and_text_of_one_length():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 20, "eos_token_id": END, **sizes, **heads},
            vision_config={"image_size": 4, "patch_size": 2, **sizes, **heads},
            projection_dim=8,
        )
    )
    batch = {
        "input_ids": text(READ),
        "attention_mask": READ,
        "pixel_values": torch.randn(2, 3, 4, 4),  # four patches and the class token
    }
    check(model, batch, lambda name: READ if name.startswith("text_model") else None)


def test_two_encoders_of_a_model_that_is_not_of_transformers():
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.question, self.answer = (
                BertModel(BertConfig(**BERT)),
                BertModel(BertConfig(**BERT)),
            )

        def forward(self, a, a_mask, b, b_mask):
            self.question(a, a_mask)  # by position
            self.answer(b, attention_mask=b_mask)

    batch = {"a": text(READ), "a_mask": READ, "b": text(WRITTEN), "b_mask": WRITTEN}

    def mask_of(name):
        if "pooler" in name:
            return None
        return READ if name.startswith("question") else WRITTEN

    check(Towers(), batch, mask_of)


def test_an_initialisation_of_a_model_with_a_decoder_reports_the_rows_of_each():
    batch = {"input_ids": text(READ), "attention_mask": READ, "labels": labels()}
    lora = LoraConfig(r=2, target_modules=["SelfAttention.q", "EncDecAttention.k"])
    rows = get_cntlora_model(t5(), lora, CNTLoRAConfig(), [batch, batch]).cntlora_report.rows
    assert {n: c for n, c in rows.items() if "block.0" in n} == {
        "encoder.block.0.layer.0.SelfAttention.q": 14,
        "decoder.block.0.layer.0.SelfAttention.q": 12,
        "decoder.block.0.layer.1.EncDecAttention.k": 14,
    }
