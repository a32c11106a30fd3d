"""Names of adapted modules: the canonical ones, and those of the files other tools write.

Canonical names are ``unet.<module path in diffusers>`` and, of text encoders,
``text_encoder.<module path>`` and ``text_encoder_2.<module path>``, without the ``text_model.``
that transformers' CLIPTextModel had before version 5 and that every file layout keeps. kohya's
names have underscores for dots; `canonical_name` puts the dots back by splitting into the words
that such a path is made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from cntlora_core.lora_file.families import SECOND_TEXT_ENCODER, TEXT_ENCODER, UNET, FileFamily
from cntlora_core.lora_file.original_unet import diffusers_path, original_path

Layout = Literal["kohya", "diffusers", "peft"]
Role = Literal["down", "up", "mid", "alpha"]

COMPONENTS = (UNET, TEXT_ENCODER, SECOND_TEXT_ENCODER)
KOHYA_PREFIXES = {
    "lora_unet_": UNET,
    "lora_te_": TEXT_ENCODER,
    "lora_te1_": TEXT_ENCODER,
    "lora_te2_": SECOND_TEXT_ENCODER,
}
PEFT_PREFIX = "base_model.model."
TEXT_MODEL = "text_model."

_SUFFIXES: dict[str, Role] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
}

# Words that hold an underscore; a number or any word without one needs no entry.
_TEXT_WORDS = (
    "text_model self_attn q_proj k_proj v_proj out_proj token_embedding position_embedding "
    "text_projection"
)
_WORDS = {
    UNET: (
        "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out "
        "conv_in conv_out conv_shortcut time_emb_proj time_embedding linear_1 linear_2 "
        "add_embedding input_blocks output_blocks middle_block in_layers out_layers emb_layers "
        "skip_connection time_embed label_emb"
    ),
    TEXT_ENCODER: _TEXT_WORDS,
    SECOND_TEXT_ENCODER: _TEXT_WORDS,
}
_TOKENS = {
    component: re.compile(
        "|".join([*sorted(words.split(), key=len, reverse=True), "[a-z]+[0-9]*", "[0-9]+"])
    )
    for component, words in _WORDS.items()
}
_FIRST_WORDS = {
    UNET: (
        *("conv_in", "conv_out", "down_blocks", "mid_block", "up_blocks", "time_embedding"),
        *("add_embedding", "input_blocks", "middle_block", "output_blocks"),
        *("time_embed", "label_emb", "out"),
    ),
    TEXT_ENCODER: ("embeddings", "encoder", "final_layer_norm", "text_projection"),
}
_FIRST_WORDS[SECOND_TEXT_ENCODER] = _FIRST_WORDS[TEXT_ENCODER]
# diffusers once kept LoRA weights in attention processors, under names of its own.
_OLD_UNET = re.compile(r"\.processor\.to_(q|k|v|out)$")
_OLD_TEXT = re.compile(r"\.self_attn\.to_(q|k|v|out)$")


class KeyParts(NamedTuple):
    """A tensor's name in a file: the module as the file spells it, and the tensor's role there."""

    module: str
    role: Role


def split_key(key: str) -> KeyParts | None:
    """The module and the role of a tensor name, or None where it names no part of a LoRA."""
    for suffix, role in _SUFFIXES.items():
        if key.endswith(suffix):
            return KeyParts(key[: -len(suffix)], role)
    return None


def kohya_name(name: str, family: FileFamily) -> str:
    """``lora_unet_...`` or ``lora_te_text_model_...`` for a canonical name.

    Raises:
        ValueError: The family's models have no such module.
    """
    component, path = split_name(name)
    try:
        prefix = family.kohya[component]
        if component == UNET and family.original_unet:
            path = original_path(path)
    except KeyError:
        raise ValueError(f"{family.title} has no module {name!r}") from None
    return prefix + f"{_text_model(component, path)}{path}".replace(".", "_")


def diffusers_name(name: str) -> str:
    """``unet.<path>`` or ``text_encoder.text_model.<path>`` for a canonical name."""
    component, path = split_name(name)
    return f"{component}.{_text_model(component, path)}{path}"


def _text_model(component: str, path: str) -> str:
    """What stands between a text encoder and the path of one of its modules in every file."""
    return "" if component == UNET or path == "text_projection" else TEXT_MODEL


def split_name(name: str) -> tuple[str, str]:
    """Component and module path of a canonical name.

    Raises ValueError for a name that is not canonical.
    """
    component, _, path = name.partition(".")
    if component not in COMPONENTS or not path or path.startswith(TEXT_MODEL):
        raise ValueError(
            f"{name!r} is no name of an adapted module; expected unet.<module path>, or "
            "text_encoder.<module path> or text_encoder_2.<module path> without text_model."
        )
    return component, path


def kohya_table(module_names: Iterable[str], family: FileFamily) -> dict[str, str]:
    """kohya name -> canonical name, for the canonical names of a model's modules."""
    return {kohya_name(name, family): name for name in module_names}


def layout_of(module: str) -> Layout:
    """The layout that spells a module like this."""
    if module.startswith("lora_"):
        return "kohya"
    return "peft" if module.startswith(PEFT_PREFIX) else "diffusers"


def canonical_name(module: str, table: dict[str, str] | None = None) -> str | None:
    """The canonical name of a module as a file spells it, or None where it fits no Stable Diffusion
    1.5 or XL.

    ``table`` (`kohya_table`) settles kohya names of models with module names of their own; without
    it, and for names that it lacks, the words of Stable Diffusion's module paths do.
    """
    if table and module in table:
        return table[module]
    for prefix, component in KOHYA_PREFIXES.items():
        if module.startswith(prefix):
            path = _dotted(module.removeprefix(prefix), component)
            return _joined(component, path) if path else None
    component, path = _component_and_path(module)
    return _joined(component, path) if component else None


def _component_and_path(module: str) -> tuple[str | None, str]:
    """Component and path of a dotted name; no component where the path starts like neither's."""
    path = module
    for component in COMPONENTS:
        if path.startswith(f"{component}."):
            path = path.removeprefix(f"{component}.").removeprefix(PEFT_PREFIX)
            return component, _modern(path)
    path = _modern(path.removeprefix(PEFT_PREFIX))
    first = path.removeprefix(TEXT_MODEL).split(".")[0]
    for component, words in _FIRST_WORDS.items():
        if first in words:
            return component, path
    return None, path


def _modern(path: str) -> str:
    path = _OLD_UNET.sub(lambda m: ".to_out.0" if m[1] == "out" else f".to_{m[1]}", path)
    return _OLD_TEXT.sub(lambda m: f".self_attn.{m[1]}_proj", path)


def _joined(component: str, path: str) -> str | None:
    if component != UNET:
        return f"{component}.{path.removeprefix(TEXT_MODEL)}"
    try:
        return f"{component}.{diffusers_path(path)}"
    except (KeyError, ValueError):  # a part of the original layout that no UNet has
        return None


def _dotted(name: str, component: str) -> str | None:
    """``mid_block_resnets_1`` -> ``mid_block.resnets.1``; None where the words do not fit."""
    words, position = [], 0
    while True:
        match = _TOKENS[component].match(name, position)
        if match is None:
            return None
        words.append(match[0])
        position = match.end()
        if position == len(name):
            break
        if name[position] != "_":
            return None
        position += 1
    path = ".".join(words)
    first = path.removeprefix(TEXT_MODEL).split(".")[0]
    return path if first in _FIRST_WORDS[component] else None
