"""The parts of a Stable Diffusion model, from a single file, a diffusers folder or the hub.

Weights are read tensor by tensor into memory of their own, in the wanted dtype: the peak is the
model plus one tensor. (Mapping the file, as the stock loaders do, holds up to two models, and the
weights change with the file when somebody overwrites it.)
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cntlora_core.data.captions import EncodedPrompts, encode_prompts
from cntlora_core.diffusion.checkpoint import CheckpointError, folder_weights, read_json
from cntlora_core.diffusion.clip_skip import skip_last_layers
from cntlora_core.diffusion.configuration_check import is_stock, pooled_width, require_working
from cntlora_core.diffusion.family import (
    SD15,
    UNET,
    VOCABULARY,
    Family,
    family_of,
)
from cntlora_core.diffusion.fingerprint import fingerprint_model
from cntlora_core.diffusion.prediction import fingerprint_suffix, scheduler_config
from cntlora_core.diffusion.schedulers import noise_scheduler, sampler
from cntlora_core.diffusion.settings import PredictionType, SchedulerName
from cntlora_core.diffusion.tokenizer import load_tokenizer
from cntlora_core.diffusion.weights import fill_from_files, names_in_file
from cntlora_core.runtime.hub import why_not_fetched
from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import reading, user_path

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline

_NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder of CLIP's make"}
_EMPTY_PROMPT = "force_zeros_for_empty_prompt"
"""Of SDXL's pipelines: whether an empty negative prompt is read as zeros."""
_OTHER_MODEL = "Download the folder again, or give another model."
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")


@dataclass(frozen=True)
class StableDiffusionParts:
    """A Stable Diffusion model, frozen and in eval mode.

    Attributes:
        family: what kind of model it is, and how it reads prompts.
        networks: the denoiser and the text encoders, by component.
        vae: images (n, 3, H, W) in [-1, 1] to latents (n, in_channels, H / latent_scale,
            W / latent_scale), and back; float32, since half precision spoils what it encodes.
        tokenizers: prompts to token ids, one for each text encoder.
        noise_scheduler: the noise schedule for training, made from ``scheduler_config``.
        scheduler_config: the model's own sampler settings; every scheduler made here honours its
            noise schedule and prediction type.
        pipeline_options: what the stock pipeline is made with, beside the parts.
        source: what was given to ``load_stable_diffusion``.
        fingerprint: 16 hex digits that identify the weights, see ``fingerprint_files``, and what
            the model predicts, where that is not epsilon; a key for caches.
    """

    family: Family
    networks: dict[str, Any]
    vae: AutoencoderKL
    tokenizers: tuple[CLIPTokenizer, ...]
    noise_scheduler: DDPMScheduler
    scheduler_config: dict[str, Any]
    pipeline_options: dict[str, Any]
    source: str
    fingerprint: str

    @property
    def unet(self) -> UNet2DConditionModel:
        """Predicts noise from latents (n, in_channels, h, w), timesteps (n,) and what the family
        makes of prompts, text states (n, tokens, cross_attention_dim) among it."""
        return self.networks[UNET]

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The first text encoder: token ids (n, tokens) to text states."""
        return self.networks["text_encoder"]

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The first tokenizer."""
        return self.tokenizers[0]

    def tokens(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Token ids of prompts (n, length), those of each tokenizer one after another.

        Raises:
            TypeError: as :func:`~cntlora_core.data.captions.encode_prompts`.
        """
        encoded = [encode_prompts(prompts, tokenizer) for tokenizer in self.tokenizers]
        return replace(encoded[0], input_ids=torch.cat([e.input_ids for e in encoded], dim=1))

    @property
    def latent_scale(self) -> int:
        """Image pixels for each latent pixel: 8 for SD1.5."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def default_resolution(self) -> int:
        """Side of the image in pixels that the model was trained for, 512 for SD1.5."""
        return self.unet.config["sample_size"] * self.latent_scale

    def pipeline(self, scheduler: SchedulerName | None = None) -> Pipeline:
        """A stock pipeline for sampling that shares these modules, with a scheduler of its own.

        Its VAE has the UNet's dtype, as stock pipelines need it: a copy where that is not float32.

        Args:
            scheduler: a sampler's name; None for the model's own.

        Raises:
            ValueError: there is no sampler of that name.
        """
        vae: Any = self.vae
        if vae.dtype != self.unet.dtype:
            vae = torch.nn.Module.to(copy.deepcopy(vae), self.unet.dtype)
        family = self.family
        pipeline = getattr(diffusers, family.pipeline)(  # slow to import, and chatty
            vae=vae,
            **self.networks,
            **dict(zip(family.tokenizers, self.tokenizers, strict=True)),
            scheduler=sampler(scheduler, self.scheduler_config),
            **self.pipeline_options,
        )
        if self.unet.device.type != "cpu":
            vae.enable_slicing()  # images are decoded one by one
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load_stable_diffusion(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    clip_skip: int = 1,
    prediction_type: PredictionType | None = None,
    local_files_only: bool | None = None,
    reporter: Reporter = silent,
) -> StableDiffusionParts:
    """Loads a model of a known family, frozen and in eval mode.

    Args:
        model: a ``.safetensors`` file in the original layout, a diffusers folder (full precision or
            fp16 files), or a hub id (``owner/name``). What exists on disk is never looked up on the
            hub, and loading it touches no network.
        dtype: of UNet and text encoders; the VAE is float32.
        device: of all parts.
        clip_skip: which layer of the text encoder is its last; those behind it are left away, and
            the fingerprint says so.
        prediction_type: what the UNet predicts, where the model says nothing or something wrong; by
            default what it says: a folder's scheduler, or the marks of a single file.
        local_files_only: for a hub id, use what is in the hub's cache and no network; by default
            ``HF_HUB_OFFLINE`` decides.
        reporter: told of the reading of the weights for their fingerprint, where that takes long.

    Raises:
        CheckpointError: what was given is no model of a known family; the message says what it is.
        ValueError: the text encoder has fewer layers than are left away.
    """
    path = _locate(model, local_files_only)
    family = family_of(path)
    parts = load_parts(
        path,
        path if path.is_dir() else family.configs,
        family,
        source=str(model),
        dtype=dtype,
        device=device,
        prediction_type=prediction_type,
        reporter=reporter,
    )
    skip_last_layers(parts.networks, clip_skip)
    name = parts.fingerprint if clip_skip == 1 else f"{parts.fingerprint}-clip-skip-{clip_skip}"
    return replace(parts, fingerprint=name)


def model_fingerprint(model: str | Path, reporter: Reporter = silent) -> str:
    """The fingerprint of a model, as in :class:`StableDiffusionParts`; no weights are loaded.

    Raises:
        CheckpointError: what was given is not there, or no model.
    """
    path = _locate(model, None)
    configs = path if path.is_dir() else family_of(path).configs
    schedule = scheduler_config(path, configs)
    return fingerprint_model(path, reporter) + fingerprint_suffix(schedule)


def model_family(model: str | Path) -> Family:
    """The family of a model; none of its weights are read, and a hub id is downloaded.

    Raises:
        CheckpointError: what was given is not there, or no model of a known family.
    """
    return family_of(_locate(model, None))


def load_parts(
    path: Path,
    configs: Path,
    family: Family = SD15,
    *,
    source: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: PredictionType | None = None,
    reporter: Reporter = silent,
) -> StableDiffusionParts:
    """Loads the weights in ``path`` into the models that the folder ``configs`` describes.

    For a single file of another width than SD1.5's, ``configs`` is a folder of that width.

    Raises:
        CheckpointError: weights are missing or have other shapes.
    """
    schedule = scheduler_config(path, configs, prediction_type)  # refused before weights are read
    models = {}
    for part in family.parts:
        files = folder_weights(path, part) if path.is_dir() else [path]
        described = configs / part / "config.json"
        what = f"the configuration of a {_NAMES.get(part, _NAMES['text_encoder'])}"
        with reading(described, what, _OTHER_MODEL), init_empty_weights():
            models[part] = build_model(part, configs, family)
        names = names_in_file(path, part, models[part].config, family)
        fill_from_files(
            models[part], files, names, torch.float32 if part == "vae" else dtype, device
        )
        if not is_stock(described, family.configs / part / "config.json"):
            with reading(described, what, _OTHER_MODEL):
                require_working(part, models[part].eval())
    fingerprint = fingerprint_model(path, reporter)
    fingerprint += fingerprint_suffix(schedule)
    return assemble(
        models, configs, family, source=source, fingerprint=fingerprint, schedule=schedule
    )


def assemble(
    models: Mapping[str, Any],
    configs: Path,
    family: Family = SD15,
    *,
    source: str,
    fingerprint: str,
    schedule: Mapping[str, Any] | None = None,
) -> StableDiffusionParts:
    """Freezes the models and adds the tokenizers and the noise schedule of the folder ``configs``.

    Args:
        models: by component.
        configs: the folder.
        family: of the models.
        source: what the parts and messages call the model.
        fingerprint: of the model.
        schedule: the scheduler's settings, in place of the folder's.

    Raises:
        CheckpointError: the parts do not fit together, or a file is missing.
    """
    unet, vae = models[UNET], models["vae"]
    encoders = [models[name] for name in family.text_encoders]
    wants = unet.config["cross_attention_dim"]
    gives = sum(encoder.config.hidden_size for encoder in encoders)
    if wants != gives:
        make = "text encoder makes" if len(encoders) == 1 else "text encoders make"
        raise CheckpointError(
            source, f"the UNet reads text states of width {wants}, the {make} {gives}."
        )
    if family.reads_sizes:
        wants, gives = pooled_width(unet), encoders[-1].config.projection_dim
        if wants != gives:
            raise CheckpointError(
                source,
                f"the UNet reads a pooled text embedding of width {wants}, the last text encoder "
                f"makes {gives}.",
            )
    wants, gives = unet.config["in_channels"], vae.config["latent_channels"]
    if wants != gives:
        raise CheckpointError(
            source, f"the UNet reads {wants} latent channels, the VAE makes {gives}."
        )
    described = configs / "scheduler" / "scheduler_config.json"
    schedule = dict(read_json(described) if schedule is None else schedule)
    with reading(described, "the settings of a scheduler", _OTHER_MODEL):
        schedule_of_training = noise_scheduler(schedule)
    tokenizers = []
    own = configs == family.configs
    for (name, padding), encoder in zip(family.tokenizers.items(), encoders, strict=True):
        words = VOCABULARY if own else configs / name
        if not (words / "tokenizer.json").is_file() and not (
            (words / "vocab.json").is_file() and (words / "merges.txt").is_file()
        ):
            raise CheckpointError(
                configs, f"{name}/ has neither vocab.json and merges.txt nor tokenizer.json."
            )
        with reading(words, "a tokenizer of CLIP's make", _OTHER_MODEL):
            tokenizers.append(load_tokenizer(words, encoder.config))
        if own:
            tokenizers[-1].pad_token = padding
    if len({tokenizer.model_max_length for tokenizer in tokenizers}) > 1:
        raise CheckpointError(configs, "its tokenizers cut prompts at different lengths.")
    for model in models.values():
        model.requires_grad_(False).eval()
    options = dict(family.pipeline_options)
    if family.reads_sizes:
        zeros = read_json(configs / "model_index.json").get(_EMPTY_PROMPT)
        options |= {_EMPTY_PROMPT: zeros} if isinstance(zeros, bool) else {}
    return StableDiffusionParts(
        family=family,
        networks={UNET: unet, **{name: models[name] for name in family.text_encoders}},
        vae=vae,
        tokenizers=tuple(tokenizers),
        noise_scheduler=schedule_of_training,
        scheduler_config=schedule,
        pipeline_options=options,
        source=source,
        fingerprint=fingerprint,
    )


def build_model(part: str, configs: Path, family: Family = SD15) -> Any:
    """The model that ``configs/<part>/config.json`` describes, freshly initialised."""
    config = read_json(configs / part / "config.json")
    for key, value in config.items():
        least, most = (1, 1000) if "layers" in key else (-(2**31), 2**31)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not least <= number <= most:
                raise CheckpointError(
                    configs / part / "config.json",
                    f"{key} is {number}; it must be between {least} and {most}.",
                )
    types, widths = config.get("down_block_types"), config.get("block_out_channels")
    if part == "vae" and types is not None and widths is not None and len(types) != len(widths):
        raise ValueError("down_block_types and block_out_channels must have the same length")
    if part in family.text_encoders:
        make = getattr(transformers, family.text_encoders[part])
        return make(CLIPTextConfig.from_dict(config))
    kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
    return kind.from_config(config)


def _locate(model: str | Path, local_files_only: bool | None) -> Path:
    """The file or folder that was meant; a hub id is downloaded, without safety checker."""
    text = str(model).strip().strip("\"'")
    for candidate in (text, text.replace("\\", "/")):
        if text and os.path.exists(path := user_path(candidate)):
            return path
    if not _HUB_ID.fullmatch(text) or Path(text).suffix in _FILE_SUFFIXES:
        raise CheckpointError(text or "''", "there is no such file or folder.")
    try:
        return Path(
            diffusers.DiffusionPipeline.download(
                text,
                use_safetensors=True,
                local_files_only=local_files_only,
                safety_checker=None,
                feature_extractor=None,
            )
        )
    except Exception as error:  # the hub's client raises a dozen kinds, OSError and others
        raise CheckpointError(text, why_not_fetched(error, "a diffusers folder")) from error
