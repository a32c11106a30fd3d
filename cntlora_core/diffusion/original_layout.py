"""The single-file ("original", "LDM") layout: how it names the parameters of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_key(part: str, name: str, config: Any) -> str:
    """Name of a parameter in the single-file layout.

    Args:
        part: ``unet``, ``vae`` or ``text_encoder``.
        name: the parameter's name in diffusers, or in transformers with or without ``text_model.``
            (transformers 5.6 dropped that level, files keep it).
        config: the part's configuration (``model.config``).

    Raises:
        ValueError: the layout has no place for this name.
    """
    try:
        if part == "unet":
            key = _unet_key(name, config)
        elif part == "vae":
            key = _vae_key(name, len(config["block_out_channels"]))
        else:
            key = name.removeprefix("text_model.")
        return _PREFIXES[part] + key
    except KeyError:
        raise ValueError(
            f"{part} parameter {name!r} has no place in the single-file layout of SD1.5: "
            "the model is built differently. Save it as a diffusers folder instead."
        ) from None


def _unet_key(name: str, config: Mapping[str, Any]) -> str:
    """Blocks are numbered through: level i holds `layers` layers and one resampling step."""
    layers = config["layers_per_block"]
    match name.split("."):
        case ["down_blocks", i, "resnets", j, layer, leaf]:
            block = (layers + 1) * int(i) + int(j) + 1
            return f"input_blocks.{block}.0.{_UNET_RESNET[layer]}.{leaf}"
        case ["down_blocks", i, "attentions", j, *rest]:
            return f"input_blocks.{(layers + 1) * int(i) + int(j) + 1}.1.{'.'.join(rest)}"
        case ["down_blocks", i, "downsamplers", "0", "conv", leaf]:
            return f"input_blocks.{(layers + 1) * (int(i) + 1)}.0.op.{leaf}"
        case ["mid_block", "resnets", j, layer, leaf]:
            return f"middle_block.{2 * int(j)}.{_UNET_RESNET[layer]}.{leaf}"
        case ["mid_block", "attentions", "0", *rest]:
            return f"middle_block.1.{'.'.join(rest)}"
        case ["up_blocks", i, "resnets", j, layer, leaf]:
            block = (layers + 1) * int(i) + int(j)
            return f"output_blocks.{block}.0.{_UNET_RESNET[layer]}.{leaf}"
        case ["up_blocks", i, "attentions", j, *rest]:
            return f"output_blocks.{(layers + 1) * int(i) + int(j)}.1.{'.'.join(rest)}"
        case ["up_blocks", i, "upsamplers", "0", "conv", leaf]:
            place = 2 if "Attn" in config["up_block_types"][int(i)] else 1
            return f"output_blocks.{(layers + 1) * int(i) + layers}.{place}.conv.{leaf}"
        case [*stem, leaf]:
            return f"{_UNET_ENDS['.'.join(stem)]}.{leaf}"
    raise KeyError(name)


def _vae_key(name: str, levels: int) -> str:
    """The original numbers the decoder's levels from the image, diffusers from the latent."""
    match name.split("."):
        case [side, ("down_blocks" | "up_blocks") as way, i, kind, j, *rest]:
            level = int(i) if way == "down_blocks" else levels - 1 - int(i)
            below = f"block.{j}" if kind == "resnets" else kind.removesuffix("rs")
            tail = ".".join(rest).replace("conv_shortcut", "nin_shortcut")
            return f"{side}.{way.removesuffix('_blocks')}.{level}.{below}.{tail}"
        case [side, "mid_block", "resnets", j, *rest]:
            return f"{side}.mid.block_{int(j) + 1}.{'.'.join(rest)}"
        case [side, "mid_block", "attentions", "0", *layer, leaf]:
            return f"{side}.mid.attn_1.{_VAE_ATTENTION['.'.join(layer)]}.{leaf}"
    return name.replace("conv_norm_out", "norm_out")
