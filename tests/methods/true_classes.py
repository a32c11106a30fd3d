"""Small random models of the classes that the papers adapt, and data that they take.

As a script it loads what a training has saved onto stock models, in a fresh process:
python true_classes.py FOLDER
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from cntlora_core import load_initialized

Batch = dict[str, Tensor]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WORDS, IMAGE_TOKEN = 60, 59
LANGUAGE = SHAPE | {
    "num_key_value_heads": 1,
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = ("q_proj", "k_proj", "v_proj")
VISION_ATTENTION = r".*attention\.(query|key|value|[qkv]_proj)"  # of transformers 4 and 5


@dataclass(frozen=True)
class TrueClass:
    """One model class.

    Attributes:
        make: The same small random model each time.
        batch: A batch from a seed.
        targets: peft's ``target_modules``.
        points: How many attachment points these are.
        inputs: How many different tensors they read.
        rows: How many tokens, patches or pixels those have in all batches, without padding.
        rank: Of the adapter.
        saved: peft's ``modules_to_save``.
        linear: The targets that are linear, for methods that know nothing else; default: all are.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    targets: str | list[str]
    points: int
    inputs: int
    rows: set[int]
    rank: int = 4
    saved: list[str] | None = None
    linear: str | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        model = self.make().eval()
        for (
            parameter
        ) in model.parameters():  # at the default scale these widths let nothing through
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        return model

    def batches(self) -> list[Batch]:
        return [self.batch(torch.Generator().manual_seed(seed)) for seed in range(4)]


def output(model: nn.Module, batch: Batch) -> Tensor:
    """What a model gives that depends on all that is adapted."""
    found: Any = model(**batch)
    names = ("logits", "pred_masks", "predicted_depth", "last_hidden_state")
    return next(found[name] for name in names if name in found)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss; of a model without one, the distance from a fixed pattern."""
    if "labels" in batch:
        return model(**batch).loss
    given = output(model, batch)
    pattern = torch.arange(given.numel(), dtype=torch.float32).sin().view_as(given)
    return (given - pattern).square().mean()


def _words(generator: torch.Generator, count: int = 4, tokens: int = 9) -> Batch:
    """Texts, of which the last one ends in two tokens of padding."""
    ids = torch.randint(3, WORDS - 5, (count, tokens), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, -2:], mask[-1, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _pictures(generator: torch.Generator, side: int = 8, count: int = 4) -> Tensor:
    return torch.randn(count, 3, side, side, generator=generator)


def _text(generator: torch.Generator) -> Batch:
    batch = _words(generator)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch | {"labels": labels}


def _text_and_class(generator: torch.Generator) -> Batch:
    batch = _words(generator)
    return batch | {"labels": batch["input_ids"][:, 0] % 3}


def _picture_and_class(generator: torch.Generator) -> Batch:
    return {
        "pixel_values": _pictures(generator),
        "labels": torch.randint(3, (4,), generator=generator),
    }


def _picture_in_text(image_tokens: int, side: int, **more: Any) -> Callable[..., Batch]:
    def batch(generator: torch.Generator) -> Batch:
        found = _text(generator)
        found["input_ids"][:, 1 : 1 + image_tokens] = IMAGE_TOKEN
        found["labels"][:, 1 : 1 + image_tokens] = -100
        return found | {"pixel_values": _pictures(generator, side), **more}

    return batch


def _llava(vision: Any, language: Any) -> tf.LlavaForConditionalGeneration:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=vision,
            text_config=language,
            image_token_index=IMAGE_TOKEN,
            image_token_id=IMAGE_TOKEN,
        )
    )


def _llava_glm() -> tf.LlavaForConditionalGeneration:
    """The parts of GLM-Edge-V: transformers has no class of that name, since the checkpoint brings
    its own code.
    """
    vision = tf.SiglipVisionConfig(image_size=8, patch_size=4, **SHAPE)
    model = _llava(vision, tf.GlmConfig(head_dim=8, **LANGUAGE))
    model.config.vision_feature_select_strategy = "full"
    return model


def _qwen() -> tf.Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={**LANGUAGE, "rope_parameters": rope, "rope_scaling": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 16,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            image_token_id=IMAGE_TOKEN,
            video_token_id=WORDS - 2,
            vision_start_token_id=WORDS - 3,
            vision_end_token_id=WORDS - 4,
        )
    )


def _qwen_batch(generator: torch.Generator) -> Batch:
    batch = _picture_in_text(4, 8)(generator)
    batch["input_ids"][:, 0] = WORDS - 3
    grid = torch.tensor([[1, 4, 4]]).repeat(4, 1)
    batch["pixel_values"] = torch.randn(4 * 16, 3 * 2 * 4 * 4, generator=generator)
    if not tf.__version__.startswith("4."):
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    return batch | {"image_grid_thw": grid}


def _mllama() -> tf.MllamaForConditionalGeneration:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 2,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {**LANGUAGE, "cross_attention_layers": [1], "rope_theta": 1e4}
    text |= {"rope_parameters": rope, "rope_scaling": rope}  # of transformers 5 and 4
    return tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    )


def _mllama_batch(generator: torch.Generator) -> Batch:
    batch = _picture_in_text(1, 8)(generator)
    tokens = batch["input_ids"].shape[1]
    return batch | {
        "pixel_values": torch.randn(4, 1, 2, 3, 8, 8, generator=generator),
        "aspect_ratio_ids": torch.ones(4, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(4, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(4, tokens, 1, 2, dtype=torch.long),
    }


def _sam() -> tf.SamModel:
    vision = tf.SamVisionConfig(
        hidden_size=16,
        mlp_dim=24,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_pos_feats=8,
        window_size=2,
        global_attn_indexes=[1],
    )
    prompts = tf.SamPromptEncoderConfig(
        hidden_size=16, image_size=16, patch_size=4, mask_input_channels=4
    )
    decoder = tf.SamMaskDecoderConfig(
        hidden_size=16,
        mlp_dim=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        iou_head_hidden_dim=8,
    )
    return tf.SamModel(
        tf.SamConfig(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
        )
    )


def _sam_batch(generator: torch.Generator) -> Batch:
    points = 16 * torch.rand(4, 1, 2, 2, generator=generator)
    return {"pixel_values": _pictures(generator, 16), "input_points": points}


def _depth() -> tf.DepthAnythingForDepthEstimation:
    backbone = tf.Dinov2Config(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        out_features=["stage1", "stage2"],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    return tf.DepthAnythingForDepthEstimation(
        tf.DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=4,
            reassemble_hidden_size=16,
            reassemble_factors=[2, 1],
            neck_hidden_sizes=[8, 16],
            fusion_hidden_size=8,
            head_hidden_size=8,
            depth_estimation_type="metric",  # a relative one ends in a ReLU, which may die
            max_depth=1,
        )
    )


TRUE_CLASSES: dict[str, TrueClass] = {
    "roberta": TrueClass(
        lambda: tf.RobertaForSequenceClassification(
            tf.RobertaConfig(
                vocab_size=WORDS, max_position_embeddings=32, num_labels=3, pad_token_id=1, **SHAPE
            )
        ),
        _text_and_class,
        ["query", "key", "value"],
        points=6,
        inputs=2,
        rows={136},
        saved=["classifier"],
    ),
    "dinov2": TrueClass(
        lambda: tf.Dinov2ForImageClassification(
            tf.Dinov2Config(
                image_size=8,
                patch_size=4,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_labels=3,
                use_swiglu_ffn=True,  # as DINOv2-g
            )
        ),
        _picture_and_class,
        VISION_ATTENTION + r"|.*attention\.(output\.dense|o_proj)",
        points=8,
        inputs=4,
        rows={80},
        saved=["classifier"],
    ),
    "clip_text": TrueClass(
        lambda: tf.CLIPTextModel(
            tf.CLIPTextConfig(
                vocab_size=WORDS,
                max_position_embeddings=16,
                bos_token_id=1,
                eos_token_id=2,
                **SHAPE,
            )
        ),
        _words,
        [*ATTENTION, "out_proj"],
        points=8,
        inputs=4,
        rows={136},
    ),
    "llava": TrueClass(
        lambda: _llava(
            tf.CLIPVisionConfig(image_size=8, patch_size=4, **(SHAPE | {"num_hidden_layers": 3})),
            tf.LlamaConfig(**LANGUAGE),
        ),
        _picture_in_text(4, 8),
        r".*vision_tower.*layers\.[01]\..*\.[qkv]_proj|.*language_model.*_proj",
        points=6 + 14,
        inputs=2 + 8,
        rows={80, 136},
    ),
    "glm_edge_v": TrueClass(
        _llava_glm,
        _picture_in_text(4, 8),
        r".*vision_tower.*layers\.0\..*\.[qkv]_proj|.*language_model.*\.[qkv]_proj",
        points=3 + 6,
        inputs=1 + 2,
        rows={64, 136},
    ),
    "qwen2_5_vl": TrueClass(
        _qwen, _qwen_batch, ["qkv", *ATTENTION], points=2 + 6, inputs=2 + 2, rows={256, 136}
    ),
    "mllama": TrueClass(
        _mllama,
        _mllama_batch,
        list(ATTENTION),
        points=9 + 6,
        inputs=3 + 3,  # the cross-attention reads text and image
        rows={256, 136, 160},
    ),
    "gemma2": TrueClass(
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(head_dim=8, **LANGUAGE)),
        _text,
        [*ATTENTION, "up_proj", "down_proj"],
        points=10,
        inputs=6,
        rows={136},
    ),
    "llama": TrueClass(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LANGUAGE)),
        _text,
        [*ATTENTION, "up_proj", "down_proj"],
        points=10,
        inputs=6,
        rows={136},
    ),
    "sam": TrueClass(
        _sam,
        _sam_batch,
        ["qkv", *ATTENTION],
        points=2 + 21,
        inputs=2 + 17,  # the decoder adds positions to queries and keys only
        rows={256, 128},
    ),
    "depth_anything": TrueClass(
        _depth,
        lambda generator: {"pixel_values": _pictures(generator, 16)},
        # layers.0.residual_layer1 of the fusion stage is never called
        VISION_ATTENTION + r"|neck\.convs\.[01]|.*(layer2|1\.residual_layer1)\.convolution[12]"
        r"|head\.conv[12]",
        points=6 + 2 + 6 + 2,
        inputs=2 + 2 + 6 + 2,
        rows={272, 256, 1024, 4096},
        rank=2,
        linear=VISION_ATTENTION,
    ),
}


def load(true: TrueClass, saved: Path) -> Batch:
    """What a saved adapter gives on a stock model: loaded, merged, and to train on."""
    batch, found = true.batches()[0], {}
    model = PeftModel.from_pretrained(true.model(), saved / "for the stock base").eval()
    found["loaded"] = output(model, batch)
    found["merged"] = output(model.merge_and_unload(), batch)
    again = load_initialized(true.model(), saved / "as trained", is_trainable=True).eval()
    found["again"] = output(again, batch)
    return {name: given.contiguous() for name, given in found.items()}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        try:
            found = load(TRUE_CLASSES[folder.name.partition(" ")[0]], folder)
            save_file(found, folder / "found.safetensors")
        except Exception:
            (folder / "error.txt").write_text(traceback.format_exc())
