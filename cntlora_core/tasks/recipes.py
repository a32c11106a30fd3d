"""What each recipe is told besides what all are told. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cntlora_core.tasks.settings import TaskSettings

GlueTask = Literal["mnli", "qnli", "qqp", "sst2", "cola", "mrpc", "rte", "stsb"]
CommonsenseSet = Literal[
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
]
COMMONSENSE: tuple[CommonsenseSet, ...] = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)


@dataclass(frozen=True, kw_only=True)
class TextSettings(TaskSettings):
    """Fine-tune a text encoder on a task of GLUE.

    Attributes:
        task: mnli, qnli, qqp, sst2, cola, mrpc, rte or stsb.
        preset: cntlora: RoBERTa-large, measured on the validation set. lava: RoBERTa-base, with
            half of the validation set (1000 samples of a large one) to choose the checkpoint by,
            and the rest to measure on.
        max_tokens: Longer samples are cut.
    """

    task: GlueTask
    preset: Literal["cntlora", "lava"] = "cntlora"
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class VisionSettings(TaskSettings):
    """Fine-tune an image classifier on a task of VTAB-1K, or on a folder of classes.

    Attributes:
        preset: cntlora: DINOv2-giant.
        tune: Train on VTAB-1K's 800 samples and measure on its 200, to choose settings by, in
            place of all 1000 and the test set.
        image_size: Side of the images in pixels.
    """

    preset: Literal["cntlora"] = "cntlora"
    tune: bool = False
    image_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class LmSettings(TaskSettings):
    """Fine-tune a causal language model on the eight commonsense sets.

    Attributes:
        preset: gemma-2 or llama-2.
        sets: Those to measure on.
        max_tokens: Longer samples are cut at their beginning.
        max_new_tokens: How long an answer may be.
        beams: Beams of the search for an answer.
        held_out: How many training samples are kept to measure on while training.
    """

    preset: Literal["gemma-2", "llama-2"] = "gemma-2"
    sets: tuple[CommonsenseSet, ...] = COMMONSENSE
    max_tokens: int | None = None
    max_new_tokens: int | None = None
    beams: int | None = None
    held_out: int = 120


@dataclass(frozen=True, kw_only=True)
class VlmSettings(TaskSettings):
    """Fine-tune a vision-language model to describe images, or to follow instructions.

    Attributes:
        preset: myvlm: LLaVA-1.5, personalised captions. apd: GLM-Edge-V, Amazon product
            descriptions. qwen2.5-vl and llama-3.2-vision: LLaVA-Instruct.
        prompt: In place of the preset's; {product_name} and {category} are filled in for apd.
        images: Folder of the images of LLaVA-Instruct; default: the folder of the data.
        held_out: Share of the samples that are kept to measure on.
        max_new_tokens: How long an answer may be.
        sentence_encoder: Hub id or folder of the encoder that compares answers (SentSim); an empty
            word for none, and nothing is generated.
        trust_remote_code: Run Python code that comes with the model, as GLM-Edge-V's does.
    """

    preset: Literal["myvlm", "apd", "qwen2.5-vl", "llama-3.2-vision"] = "myvlm"
    prompt: str | None = None
    images: str | None = None
    held_out: float | None = None
    max_new_tokens: int = 128
    sentence_encoder: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(TaskSettings):
    """Fine-tune SAM to segment one kind of object, without a prompt.

    Attributes:
        preset: polyp, camo, leaf, isic2017 or sbu.
        loss: structure (weighted cross-entropy and intersection over union) or balanced (balanced
            cross-entropy).
    """

    preset: Literal["polyp", "camo", "leaf", "isic2017", "sbu"] = "polyp"
    loss: Literal["structure", "balanced"] | None = None


@dataclass(frozen=True, kw_only=True)
class DepthSettings(TaskSettings):
    """Fine-tune Depth-Anything to estimate distances in metres.

    Attributes:
        preset: nyu: NYU depth v2.
        max_depth: Largest distance that is estimated and measured, in whole metres.
        image_size: Height and width of the images in pixels.
        depth_scale: What the values of the depth images are divided by to give metres.
    """

    preset: Literal["nyu"] = "nyu"
    max_depth: int | None = None
    image_size: tuple[int, int] | None = None
    depth_scale: float = 1000.0
