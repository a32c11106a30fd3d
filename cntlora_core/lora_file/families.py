"""What LoRA files of one model family have in common, and how to tell whose a file is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNET, TEXT_ENCODER, SECOND_TEXT_ENCODER = "unet", "text_encoder", "text_encoder_2"
"""The components of a model that adapters change."""


@dataclass(frozen=True)
class FileFamily:
    """How files of a family spell their names, and what they say of their base.

    Attributes:
        title: What messages call the family.
        kohya: What kohya's names begin with, by component.
        original_unet: Whether kohya's names of the UNet are those of the original layout
            (input_blocks), in place of diffusers' (down_blocks).
        architecture: ModelSpec's word for a LoRA of the family.
        implementation: ModelSpec's word for whose names it has, as sd-scripts gives it.
        base_version: sd-scripts' word for the base.
    """

    title: str
    kohya: Mapping[str, str]
    original_unet: bool
    architecture: str
    implementation: str
    base_version: str


SD15_FILES = FileFamily(
    title="Stable Diffusion 1.5",
    kohya={UNET: "lora_unet_", TEXT_ENCODER: "lora_te_"},
    original_unet=False,
    architecture="stable-diffusion-v1/lora",
    implementation="diffusers",
    base_version="sd_v1",
)
SDXL_FILES = FileFamily(
    title="Stable Diffusion XL",
    kohya={UNET: "lora_unet_", TEXT_ENCODER: "lora_te1_", SECOND_TEXT_ENCODER: "lora_te2_"},
    original_unet=True,
    architecture="stable-diffusion-xl-v1-base/lora",
    implementation="https://github.com/Stability-AI/generative-models",
    base_version="sdxl_base_v1-0",
)

_SDXL_MARKS = (
    "lora_te2_",
    f"{SECOND_TEXT_ENCODER}.",
    "lora_unet_input_blocks_",
    "lora_unet_middle_block_",
    "lora_unet_output_blocks_",
)


def family_of_keys(keys: Iterable[str], header: Mapping[str, str] | None = None) -> FileFamily:
    """The family of a LoRA file, by its keys and its header; Stable Diffusion 1.5 where they do
    not say.

    Args:
        keys: Names of tensors, or of modules as the file or the library spells them.
        header: The strings of the file's header.
    """
    header = header or {}
    said = (header.get("modelspec.architecture", ""), header.get("ss_base_model_version", ""))
    if said[0] == SDXL_FILES.architecture or said[1].startswith("sdxl"):
        return SDXL_FILES
    # A transformer of SD1.5 has one block only.
    deep = (".transformer_blocks.1.", "_transformer_blocks_1_")
    found = any(
        key.startswith(_SDXL_MARKS)
        or (key.startswith(("unet.", "lora_unet_")) and any(mark in key for mark in deep))
        for key in keys
    )
    return SDXL_FILES if found else SD15_FILES
