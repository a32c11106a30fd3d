"""The single-file ("original", "LDM") layout: how it names the parameters of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cntlora_core.lora_file.original_unet import original_path

_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


# The second text encoder of SDXL is one of OpenCLIP, whose names are others.
_OPEN_CLIP = {
    "embeddings.": "",
    "position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "final_ln_": "ln_final",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.": "attn.",
    "q_proj.": "in_proj_",
    "k_proj.": "in_proj_",
    "v_proj.": "in_proj_",
    "text_projection.weight": "text_projection",
}


def original_key(part: str, name: str, config: Any, prefix: str) -> str:
    """Name of a parameter in the single-file layout.

    The names of a second text encoder's query, key and value are one: they are kept as one matrix,
    see :func:`part_of_tensor`.

    Args:
        part: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``.
        name: the parameter's name in diffusers, or in transformers with or without ``text_model.``
            (transformers 5.6 dropped that level, files keep it).
        config: the part's configuration (``model.config``).
        prefix: what names of that part begin with.

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
            if part == "text_encoder_2":
                for ours, theirs in _OPEN_CLIP.items():
                    key = key.replace(ours, theirs)
        return prefix + key
    except KeyError:
        raise ValueError(
            f"{part} parameter {name!r} has no place in the single-file layout: the model is "
            "built differently. Save it as a diffusers folder instead."
        ) from None


def part_of_tensor(name: str, key: str, tensor: Tensor) -> Tensor:
    """What a file's tensor holds of a parameter: a third of OpenCLIP's query, key and value.

    Args:
        name: the parameter's name in transformers.
        key: the tensor's name in the file.
        tensor: as the file has it; OpenCLIP's projection is transposed.
    """
    if key.endswith((".in_proj_weight", ".in_proj_bias")):
        return tensor.chunk(3)[("q_proj", "k_proj", "v_proj").index(name.split(".")[-2])]
    return tensor.T if key.endswith(".text_projection") else tensor


def _unet_key(name: str, config: Mapping[str, Any]) -> str:
    path, _, leaf = name.rpartition(".")
    kinds = config["up_block_types"]
    plain = [i for i, kind in enumerate(kinds) if "Attn" not in kind]
    return f"{original_path(path, config['layers_per_block'], plain)}.{leaf}"


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
