"""What tells one family of diffusion models from another: its parts, and how it reads a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cntlora_core.data.framing import Frame
from cntlora_core.diffusion.checkpoint import CheckpointError, CheckpointKind, identify
from cntlora_core.lora_file.families import SD15_FILES, SDXL_FILES, UNET, FileFamily
from cntlora_core.runtime.reading import read_json_object

Networks = Mapping[str, Any]
"""What an adapter may change, by component: ``unet``, then the text encoders. The names are those
of the parts of a diffusers pipeline."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the denoiser reads beside latents and timesteps.

    Attributes:
        states: (n, length, width) text states; one row may stand for all samples.
        pooled: (n, width) the prompt as one vector, or None where the family has none.
        time_ids: (n, 6) sizes and crop of each image, see :meth:`Family.time_ids`, or None.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of some of the samples."""
        return Conditioning(*(None if t is None else t[index] for t in self._tensors))  # pyright: ignore[reportArgumentType]

    @staticmethod
    def joined(parts: Sequence[Conditioning]) -> Conditioning:
        """One conditioning of the samples of several."""
        return Conditioning(
            *(
                None if tensors[0] is None else torch.cat(tensors)  # pyright: ignore[reportArgumentType, reportCallIssue]
                for tensors in zip(*(part._tensors for part in parts), strict=True)
            )
        )

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.states, self.pooled, self.time_ids


def predict(unet: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """What the denoiser predicts, (n, c, h, w).

    Args:
        unet: A UNet2DConditionModel.
        latents: (n, c, h, w) noised latents, in its data type and on its device.
        timesteps: (n,).
        conditioning: Of as many samples.
    """
    added = None
    if conditioning.pooled is not None:
        assert conditioning.time_ids is not None
        added = {
            "text_embeds": conditioning.pooled,
            "time_ids": conditioning.time_ids.to(latents.device),
        }
    return unet(
        latents,
        timesteps,
        encoder_hidden_states=conditioning.states,
        added_cond_kwargs=added,
    ).sample


@dataclass(frozen=True)
class Family:
    """A family of models of one architecture.

    Attributes:
        name: The word for it in records.
        files: Its LoRA files, and what messages call it.
        kind: What ``identify`` says of its checkpoints.
        configs: Folder with the configurations of its parts.
        text_encoders: The class in transformers of each text encoder, by component.
        tokenizers: The token that pads prompts of each text encoder, by folder.
        prefixes: What names of weights begin with in a single file, by component.
        pipeline: The class of its stock pipeline in diffusers.
        pipeline_options: What that pipeline is made with, beside the parts.
        read: Text encoders and, for each, (n, length) token ids to the conditioning of n prompts.
        unread_layers: How many of a text encoder's last layers make nothing that is read.
        reads_sizes: Whether the denoiser reads the images' sizes and crops.
    """

    name: str
    files: FileFamily
    kind: CheckpointKind
    configs: Path
    text_encoders: Mapping[str, str]
    tokenizers: Mapping[str, str]
    prefixes: Mapping[str, str]
    pipeline: str
    read: Callable[[Sequence[Any], Sequence[Tensor]], Conditioning]
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    unread_layers: Mapping[str, int] = field(default_factory=dict)
    reads_sizes: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that have weights."""
        return (UNET, "vae", *self.text_encoders)

    def encode(
        self, networks: Networks, tokens: Tensor, time_ids: Tensor | None = None
    ) -> Conditioning:
        """The conditioning of prompts.

        Args:
            networks: With the text encoders.
            tokens: (n, length) token ids, those of each tokenizer one after another.
            time_ids: (n, 6), see :meth:`time_ids`; None where the denoiser reads none.
        """
        encoders = [networks[name] for name in self.text_encoders]
        tokens = tokens.to(next(encoders[0].parameters()).device)
        found = self.read(encoders, tokens.chunk(len(encoders), dim=1))
        return Conditioning(found.states, found.pooled, time_ids)

    def unread(self, networks: Networks) -> tuple[str, ...]:
        """Beginnings of the names of modules that no adapter should go to: nothing reads them."""
        prefixes = []
        for component, count in self.unread_layers.items():
            path, layers = text_layers(networks[component])
            prefixes += [f"{component}.{path}.{len(layers) - 1 - i}." for i in range(count)]
        return tuple(prefixes)

    def time_ids(self, frames: Iterable[Frame]) -> Tensor | None:
        """(n, 6): height and width of each picture, top and left of what is kept of it, height and
        width of that; None where the denoiser reads no sizes.

        Top and left count in pixels of the picture as it is resized to be cropped
        (arXiv 2307.01952, section 2.2, and diffusers' training scripts).
        """
        if not self.reads_sizes:
            return None
        rows = []
        for frame in frames:
            left, top = frame.offset
            rows.append([*frame.picture[::-1], top, left, *frame.size[::-1]])
        return torch.tensor(rows, dtype=torch.float32)


def text_layers(text_encoder: Any) -> tuple[str, Any]:
    """The layers of a text encoder of CLIP's make, and the path to them."""
    return next((n, m) for n, m in text_encoder.named_modules() if n.endswith("encoder.layers"))


def _last_states(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Conditioning:
    return Conditioning(encoders[0](tokens[0])[0])


def _last_but_one_and_pooled(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> Conditioning:
    outputs = [
        encoder(ids, output_hidden_states=True)
        for encoder, ids in zip(encoders, tokens, strict=True)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return Conditioning(states, outputs[-1].text_embeds)


SD15 = Family(
    name="sd15",
    files=SD15_FILES,
    kind=CheckpointKind.SD15,
    configs=Path(__file__).parent / "sd15",
    text_encoders={"text_encoder": "CLIPTextModel"},
    tokenizers={"tokenizer": "<|endoftext|>"},
    prefixes={
        UNET: "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.text_model.",
    },
    pipeline="StableDiffusionPipeline",
    read=_last_states,
    pipeline_options={
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
)

SDXL = Family(
    name="sdxl",
    files=SDXL_FILES,
    kind=CheckpointKind.SDXL,
    configs=Path(__file__).parent / "sdxl",
    text_encoders={
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
    tokenizers={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
    prefixes={
        UNET: "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    pipeline="StableDiffusionXLPipeline",
    read=_last_but_one_and_pooled,
    pipeline_options={"add_watermarker": False},
    unread_layers={"text_encoder": 1},
    reads_sizes=True,
)

FAMILIES = {family.name: family for family in (SD15, SDXL)}

VOCABULARY = SD15.configs / "tokenizer"
"""CLIP's, which the tokenizers of all families share."""


def default_resolution(path: Path) -> int:
    """Side of the image in pixels that a model was trained for; its weights are not read.

    Args:
        path: A checkpoint file or a diffusers folder.

    Raises:
        CheckpointError: it is no whole model of a family that is known.
    """
    configs = path if path.is_dir() else family_of(path).configs
    unet, vae = (
        read_json_object(configs / part / "config.json", "a configuration")
        for part in ("unet", "vae")
    )
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def family_of(path: str | Path) -> Family:
    """The family of the model in a checkpoint file or a diffusers folder.

    Raises:
        CheckpointError: it is no whole model of a family that is known.
    """
    kind = identify(path)
    for family in FAMILIES.values():
        if family.kind is kind:
            return family
    raise CheckpointError(path, f"this is {kind.value}.")
