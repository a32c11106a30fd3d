"""LAVA on the layouts that its paper fine-tunes, in small random models of the real classes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model
from torch import nn

from cntlora_core.lava import LavaConfig, OrthogonalityLoss
from cntlora_core.lava.inject import lava_layers


def sdxl_unet():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
        cross_attention_dim=12,
        norm_num_groups=4,
    )
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 12), "time_ids": torch.ones(1, 6)},
    }
    return unet, inputs, lambda out: out.sample


def sam():
    config = transformers.SamVisionConfig(
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=32,
        num_pos_feats=4,
        initializer_range=0.1,  # its own is 1e-10, where gradients vanish
    )
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    return transformers.SamVisionModel(config), inputs, lambda out: out.last_hidden_state


def depth_anything():
    backbone = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=16,
        reassemble_factors=[4, 2],
        neck_hidden_sizes=[8, 12],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    inputs = {"pixel_values": torch.randn(1, 3, 28, 28)}
    model = transformers.DepthAnythingForDepthEstimation(config)
    return model, inputs, lambda out: out.predicted_depth


def text_model(model_class, config_class, **options):
    config = config_class(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        **options,
    )
    inputs = {"input_ids": torch.arange(5, 13)[None]}
    return model_class(config), inputs, lambda out: out[0]


LAYOUTS = {
    "SDXL's UNet": sdxl_unet,
    "SAM's image encoder": sam,
    "Depth-Anything": depth_anything,
    "RoBERTa": lambda: text_model(transformers.RobertaModel, transformers.RobertaConfig),
    "Gemma-2": lambda: text_model(
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        num_key_value_heads=1,
        head_dim=8,
    ),
    "LLaMA-2": lambda: text_model(transformers.LlamaForCausalLM, transformers.LlamaConfig),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_attaches_trains_a_step_and_comes_back(name, tmp_path):
    torch.manual_seed(0)
    base, inputs, read = LAYOUTS[name]()
    base.eval()
    stock = copy.deepcopy(base)
    kinds = (nn.Linear, nn.Conv2d, nn.Conv1d)
    # An output layer is tied to the embeddings, which merging would change as well.
    targets = [n for n, m in base.named_modules() if isinstance(m, kinds) and n != "lm_head"]
    before = read(base(**inputs))
    model = get_peft_model(base, LavaConfig(r=2, target_modules=targets))
    found = lava_layers(model)
    assert set(found) == set(targets)
    assert torch.equal(read(model(**inputs)), before)
    has_kernels = any(layer.factor_names != ("U", "V") for layer in found.values())
    assert has_kernels == (name in ("SDXL's UNet", "SAM's image encoder", "Depth-Anything"))
    term = OrthogonalityLoss(model)
    assert len(term.factors) == len(targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    towards = torch.randn_like(before)
    ((read(model(**inputs)) * towards).mean() + term()).backward()
    gradients = [layer.lava_V["default"].grad for layer in found.values()]
    reached = sum(gradient is not None and bool(gradient.any()) for gradient in gradients)
    # Depth-Anything's first fusion has nothing to add: its two convolutions never run.
    assert reached >= len(targets) - (2 if name == "Depth-Anything" else 1)
    optimizer.step()
    after = read(model(**inputs))
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stock, tmp_path)
    torch.testing.assert_close(read(loaded(**inputs)), after)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(read(merged(**inputs)), after, rtol=1e-3, atol=1e-4)
