"""What a LoRA file says about itself: ModelSpec, kohya's ``ss_`` keys, and ours under ``cntlora.``.

Spellings follow ModelSpec 1.0.0 (https://github.com/Stability-AI/ModelSpec) and
kohya-ss/sd-scripts, whose keys web UIs and viewers read. Everything in a safetensors header is a
string.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from importlib import metadata as package_metadata
from typing import Any

from safetensors.torch import save
from torch import Tensor

from cntlora_core.lora_file.algebra import LoRALayer
from cntlora_core.lora_file.families import SD15_FILES, FileFamily

RECORDED_PACKAGES = ("cntlora", "torch", "diffusers", "transformers", "peft")


def modelspec_metadata(
    *,
    title: str,
    resolution: int | tuple[int, int],
    method: str,
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    tag_frequency: Mapping[str, Mapping[str, int]] | None = None,
    trigger_phrase: str | None = None,
    description: str | None = None,
    author: str | None = None,
    license: str | None = None,
    tags: str | None = None,
    clip_skip: int | None = None,
    prediction_type: str = "epsilon",
    family: FileFamily = SD15_FILES,
    date: datetime.datetime | None = None,
) -> dict[str, str]:
    """The header of a LoRA file; `write_lora_file` adds what depends on its tensors.

    Args:
        title: for people; sd-scripts uses the output's name.
        resolution: pixels, one side or (width, height).
        method: the initialisation, for example ``cntlora-cross`` or ``lora``.
        settings: everything else the run was made with; stored as JSON.
        training: facts of the run under sd-scripts' names without ``ss_``: ``learning_rate``,
            ``unet_lr``, ``text_encoder_lr``, ``num_train_images``, ``num_reg_images``,
            ``max_train_steps``, ``steps``, ``seed``, ``output_name``, ``sd_model_name``,
            ``prior_loss_weight``, ``min_snr_gamma``, ``optimizer`` and so on. Mappings and lists
            become JSON; None becomes the text "None", as in sd-scripts.
        tag_frequency: folder -> caption or tag -> number of images; web UIs show it as the
            trained words.
        trigger_phrase: the words that call up the subject.
        family: of the model that it is for.
        prediction_type: what the denoiser was trained to predict, in diffusers' words: epsilon,
            v_prediction or sample.
        date: when it was made; now, if not given.

    Raises:
        ValueError: ``settings`` hold something that JSON cannot, or a fact is not finite.
    """
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    date = date or datetime.datetime.now()
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": family.architecture,
        "implementation": family.implementation,
        "title": title,
        "resolution": f"{width}x{height}",
        "date": date.isoformat(timespec="seconds"),
        "prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "description": description,
        "author": author,
        "license": license,
        "tags": tags,
        "trigger_phrase": trigger_phrase,
        "usage_hint": f"Use the words: {trigger_phrase}" if trigger_phrase else None,
        "encoder_layer": None if clip_skip is None else str(clip_skip),
    }
    result = {f"modelspec.{key}": value for key, value in spec.items() if value is not None}
    facts = {
        "base_model_version": family.base_version,
        "v2": False,
        "resolution": f"({width}, {height})",
        "clip_skip": clip_skip,
        **({"tag_frequency": tag_frequency} if tag_frequency else {}),
        **(training or {}),
    }
    result |= {f"ss_{key}": _text(value) for key, value in facts.items()}
    result["cntlora.method"] = method
    result["cntlora.versions"] = json.dumps(package_versions())
    try:
        result["cntlora.settings"] = json.dumps(dict(settings or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings cannot be stored as JSON: {error}") from error
    return result


def package_versions() -> dict[str, str]:
    """Versions of the packages that a run depends on; those that are not installed are left out."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = package_metadata.version(name)
        except package_metadata.PackageNotFoundError:
            continue
    return versions


def tensor_metadata(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LoRALayer]
) -> dict[str, str]:
    """Rank and alpha as sd-scripts writes them ("Dynamic" where they differ), and the hash of the
    tensors.

    The hash is SHA-256 over everything after the file's header, so it does not change with the
    metadata; ModelSpec and web UIs (``sshs_model_hash``) agree on that.
    """
    content = save(dict(tensors))
    header = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(memoryview(content)[header:]).hexdigest()
    ranks = Counter(layer.rank for layer in layers.values())
    alphas = Counter(layer.alpha for layer in layers.values())
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{next(iter(alphas)):g}" if len(alphas) == 1 else "Dynamic",
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
    }


def _text(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a fact of the training is {value}, which no reader understands")
    return str(value)
