"""Module paths of a UNet in the original ("LDM", "sgm") layout, from those of diffusers and back.

Blocks are numbered through there: level i holds ``layers`` layers and one resampling step.
"""

from __future__ import annotations

from collections.abc import Container

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS_BACK = {theirs: ours for ours, theirs in _ENDS.items()}
_RESNET_BACK = {theirs: ours for ours, theirs in _RESNET.items()}


def original_path(path: str, layers: int = 2, plain: Container[int] = ()) -> str:
    """``down_blocks.1.attentions.0`` -> ``input_blocks.4.1``.

    Args:
        path: Of a module in diffusers.
        layers: Layers of each level.
        plain: The ``up_blocks`` without attention.

    Raises:
        KeyError: The layout has no place for it.
    """
    match path.split("."):
        case ["down_blocks", i, "resnets", j, layer]:
            return f"input_blocks.{(layers + 1) * int(i) + int(j) + 1}.0.{_RESNET[layer]}"
        case ["down_blocks", i, "attentions", j, *rest]:
            return ".".join([f"input_blocks.{(layers + 1) * int(i) + int(j) + 1}.1", *rest])
        case ["down_blocks", i, "downsamplers", "0", "conv"]:
            return f"input_blocks.{(layers + 1) * (int(i) + 1)}.0.op"
        case ["mid_block", "resnets", j, layer]:
            return f"middle_block.{2 * int(j)}.{_RESNET[layer]}"
        case ["mid_block", "attentions", "0", *rest]:
            return ".".join(["middle_block.1", *rest])
        case ["up_blocks", i, "resnets", j, layer]:
            return f"output_blocks.{(layers + 1) * int(i) + int(j)}.0.{_RESNET[layer]}"
        case ["up_blocks", i, "attentions", j, *rest]:
            return ".".join([f"output_blocks.{(layers + 1) * int(i) + int(j)}.1", *rest])
        case ["up_blocks", i, "upsamplers", "0", "conv"]:
            place = 1 if int(i) in plain else 2
            return f"output_blocks.{(layers + 1) * int(i) + layers}.{place}.conv"
    return _ENDS[path]


def diffusers_path(path: str, layers: int = 2) -> str:
    """Inverse of :func:`original_path`; a path of diffusers stays as it is.

    Raises:
        KeyError: No UNet has such a module.
    """
    if path in _ENDS_BACK:
        return _ENDS_BACK[path]
    match path.split("."):
        case ["input_blocks", block, "0", "op"]:
            return f"down_blocks.{int(block) // (layers + 1) - 1}.downsamplers.0.conv"
        case ["output_blocks", block, _, "conv"]:
            return f"up_blocks.{int(block) // (layers + 1)}.upsamplers.0.conv"
        case ["middle_block", "1", *rest]:
            return ".".join(["mid_block.attentions.0", *rest])
        case ["middle_block", block, *rest]:
            return f"mid_block.resnets.{int(block) // 2}.{_RESNET_BACK['.'.join(rest)]}"
        case [("input_blocks" | "output_blocks") as side, block, kind, *rest]:
            down = side == "input_blocks"
            level, layer = divmod(int(block) - down, layers + 1)
            stem = f"{'down' if down else 'up'}_blocks.{level}"
            if kind == "0":
                return f"{stem}.resnets.{layer}.{_RESNET_BACK['.'.join(rest)]}"
            return ".".join([f"{stem}.attentions.{layer}", *rest])
    return path
