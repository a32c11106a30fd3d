"""LoRA files: taking an adapter out of a model, writing it for other tools, reading what they
wrote.

Inside the library an adapter is a dict of canonical name -> `LoRALayer` (`lora_names`,
`lora_algebra`). The three layouts on the disk, and what each keeps, are described in
docs/lora_file.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.lora_file.algebra import (
    LoRALayer,
    LoRALayers,
    alpha_for,
    compress,
    compress_layers,
    relative_error,
    subtract_initial,
    subtract_initial_layers,
    total_relative_error,
    with_alpha,
    without_mid,
)
from cntlora_core.lora_file.families import SD15_FILES, FileFamily
from cntlora_core.lora_file.metadata import modelspec_metadata, tensor_metadata
from cntlora_core.lora_file.names import (
    COMPONENTS,
    PEFT_PREFIX,
    TEXT_ENCODER,
    TEXT_MODEL,
    UNET,
    Layout,
    diffusers_name,
    kohya_name,
    split_name,
)
from cntlora_core.lora_file.peft_config import DIFFUSERS_METADATA_KEY
from cntlora_core.lora_file.reading import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoRAFile,
    read_lora_file,
)
from cntlora_core.runtime.files import save_safetensors_atomic, write_json_atomic

__all__ = [
    "Layout",
    "LoRAFile",
    "LoRALayer",
    "LoRALayers",
    "collect_adapter",
    "compress",
    "compress_layers",
    "diffusers_tensors",
    "modelspec_metadata",
    "read_lora_file",
    "relative_error",
    "subtract_initial",
    "subtract_initial_layers",
    "total_relative_error",
    "write_lora_file",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def collect_adapter(
    model: nn.Module, adapter_name: str = "default", prefix: str = UNET
) -> LoRALayers:
    """Copies of a peft LoRA adapter's factors (float32, CPU) under canonical names.

    ``model`` is a PeftModel or a module with injected LoRA layers; ``prefix`` is ``unet``,
    ``text_encoder`` or ``text_encoder_2``. The scaling is read from each layer, so rank and alpha
    patterns and rsLoRA come out right: alpha = scaling * rank.

    Raises ValueError where the model has no such adapter, or where the adapter is more than a LoRA
    (DoRA, a bias, an embedding, another variant), naming the layer.
    """
    from peft.tuners.lora import LoraLayer

    layers: LoRALayers = {}
    adapters: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        adapters |= module.r.keys()
        if adapter_name not in module.r:
            continue
        path = path.removeprefix(PEFT_PREFIX)
        _require_plain_lora(module, adapter_name, path)
        down: Tensor = module.lora_A.get_submodule(adapter_name).weight  # type: ignore[assignment]
        up: Tensor = module.lora_B.get_submodule(adapter_name).weight  # type: ignore[assignment]
        name = f"{prefix}.{path.removeprefix(TEXT_MODEL)}"
        split_name(name)
        rank = down.shape[0]
        layers[name] = LoRALayer(
            down=down.detach().to("cpu", torch.float32, copy=True),
            up=up.detach().to("cpu", torch.float32, copy=True),
            alpha=alpha_for(float(module.scaling[adapter_name]), rank),
        )
    if not layers:
        has = f"it has {sorted(adapters)}" if adapters else "it has no LoRA layer at all"
        raise ValueError(f"{type(model).__name__} has no adapter named {adapter_name!r}: {has}")
    return layers


def _require_plain_lora(module: Any, adapter_name: str, path: str) -> None:
    found = None
    if module.use_dora.get(adapter_name) or adapter_name in module.lora_magnitude_vector:
        found = "is a DoRA adapter"
    elif adapter_name in getattr(module, "lora_variant", {}):
        found = f"is of the variant {type(module.lora_variant[adapter_name]).__name__}"
    elif getattr(module, "lora_bias", {}).get(adapter_name):
        found = "trains a bias (lora_bias)"
    elif adapter_name not in module.lora_A:
        found = "adapts an embedding"
    elif getattr(module, "fan_in_fan_out", False):
        found = "adapts a transposed weight (fan_in_fan_out)"
    if found:
        raise ValueError(f"{path} {found}; a LoRA file can hold plain LoRA layers only")


def write_lora_file(
    path: str | Path,
    layers: Mapping[str, LoRALayer],
    *,
    layout: Layout = "kohya",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    family: FileFamily = SD15_FILES,
) -> Path:
    """Writes an adapter, never half of one, and returns the path.

    - ``kohya``: for ComfyUI, web UIs and diffusers, in the names that sd-scripts gives to the
      family's modules. Every layer carries an alpha, the same one for
      all of them: diffusers mis-scales kohya files whose alphas differ, so the ratio goes into
      the up factor.
    - ``diffusers``: for ``load_lora_weights``. The scaling goes into the up factor (alpha = rank)
      and the ranks also stand in the header, so that the file is right with the versions that
      read that header and with those that do not.
    - ``peft``: ``path`` is a folder; ``unet/``, ``text_encoder/`` and ``text_encoder_2/`` in it
      are for ``PeftModel.from_pretrained``. Factors and alphas are stored as they are.

    In the last two a middle kernel is contracted into the down factor. Hash, rank and alpha of
    what is stored are added to ``metadata``.

    Raises:
        ValueError: no layers, a name that is not canonical, a value that is not finite (or not
            in ``dtype``), an unknown layout or dtype, a folder where a file belongs or the other
            way round.
        OSError: as `files.atomic_write`.
    """
    path = Path(path)
    if not layers:
        raise ValueError("there are no LoRA layers to write")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    # Of a file that was read; in a kohya file it makes diffusers refuse to load.
    own = {key: text for key, text in (metadata or {}).items() if key != DIFFUSERS_METADATA_KEY}
    if layout == "peft":
        return _write_peft(path, layers, own, dtype)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; a LoRA in the {layout} layout is one .safetensors file"
        )
    if layout == "kohya":
        stored = _with_shared_alpha(layers)
        tensors = _kohya_tensors(stored, dtype, family)
        extra = {}
    elif layout == "diffusers":
        stored = {name: _unscaled(without_mid(layer)) for name, layer in layers.items()}
        tensors = _in_diffusers_words(stored, dtype)
        extra = {DIFFUSERS_METADATA_KEY: json.dumps(_diffusers_header(stored), sort_keys=True)}
    else:
        raise ValueError(f"layout must be kohya, diffusers or peft, got {layout!r}")
    full = {**own, **tensor_metadata(tensors, stored), **extra}
    return save_safetensors_atomic(tensors, path, full)


def diffusers_tensors(
    layers: Mapping[str, LoRALayer],
    dtype: torch.dtype = torch.float32,
    family: FileFamily = SD15_FILES,
) -> dict[str, Tensor]:
    """An adapter as ``load_lora_weights`` takes it in memory: in kohya's names, without mids.

    A dict has no header, and diffusers before 0.40 scales layers without an alpha by the rank of
    the first one. It is right where all carry one alpha, whatever their ranks.
    """
    stored = {name: without_mid(layer) for name, layer in layers.items()}
    return _kohya_tensors(_with_shared_alpha(stored), dtype, family)


def _kohya_tensors(
    layers: Mapping[str, LoRALayer], dtype: torch.dtype, family: FileFamily
) -> dict[str, Tensor]:
    names = {name: kohya_name(name, family) for name in layers}
    words = ("lora_down", "lora_up", "lora_mid")
    tensors = _factor_tensors(layers, names.__getitem__, words, dtype)
    for name, layer in layers.items():
        tensors[f"{names[name]}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return tensors


def _in_diffusers_words(layers: Mapping[str, LoRALayer], dtype: torch.dtype) -> dict[str, Tensor]:
    return _factor_tensors(layers, diffusers_name, ("lora_A", "lora_B", ""), dtype)


def _with_shared_alpha(layers: Mapping[str, LoRALayer]) -> LoRALayers:
    """The same changes under one alpha: the most common one (not 0, which kohya takes for rank)."""
    counts = Counter(layer.alpha for layer in layers.values() if layer.alpha != 0)
    shared = max(counts, key=lambda alpha: (counts[alpha], alpha)) if counts else 1.0
    return {name: with_alpha(layer, shared) for name, layer in layers.items()}


def _unscaled(layer: LoRALayer) -> LoRALayer:
    return with_alpha(layer, float(layer.rank))


def _factor_tensors(
    layers: Mapping[str, LoRALayer],
    spell: Callable[[str], str],
    words: tuple[str, str, str],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for word, factor in zip(words, (layer.down, layer.up, layer.mid)):
            if factor is None:
                continue
            stored = factor.detach().to(dtype, copy=True).contiguous()
            if not torch.isfinite(stored).all():
                why = "not finite" if not torch.isfinite(factor).all() else f"too large for {dtype}"
                raise ValueError(f"{name}: a value of {word} is {why}; nothing was written")
            tensors[f"{spell(name)}.{word}.weight"] = stored
    return tensors


def _config(layers: Mapping[str, LoRALayer], paths: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a peft LoraConfig that give each layer its rank and alpha.

    ``paths`` is canonical name -> module path in the model. The patterns are regexes, to which peft
    adds ``(.*\\.)?`` in front and ``$`` behind.
    """
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {
            re.escape(paths[name]): layer.rank
            for name, layer in layers.items()
            if layer.rank != rank
        },
        "alpha_pattern": {
            re.escape(paths[name]): _plain(layer.alpha)
            for name, layer in layers.items()
            if layer.alpha != alpha
        },
        "target_modules": sorted(paths[name] for name in layers),
    }


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha


def _by_component(layers: Mapping[str, LoRALayer]) -> dict[str, LoRALayers]:
    parts: dict[str, LoRALayers] = {}
    for name, layer in layers.items():
        parts.setdefault(split_name(name)[0], {})[name] = layer
    return parts


def _diffusers_header(layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    # Paths without text_model. match as suffixes under every version of transformers.
    header = {}
    for component, part in _by_component(layers).items():
        config = _config(part, {name: split_name(name)[1] for name in part})
        header |= {f"{component}.{key}": value for key, value in config.items()}
    return header


def _write_peft(
    folder: Path, layers: Mapping[str, LoRALayer], metadata: Mapping[str, str], dtype: torch.dtype
) -> Path:
    if folder.is_file() or folder.suffix == ".safetensors":
        raise ValueError(f"the peft layout is a folder with a folder for each part, got {folder}")
    parts = _by_component(layers)
    for other in set(COMPONENTS) - parts.keys():
        if (folder / other / PEFT_WEIGHTS).exists():
            raise ValueError(
                f"{folder} already holds an adapter for {other}, which this one does not have; "
                "choose another folder, or the two would be read as one"
            )
    for component, part in parts.items():
        part = {name: without_mid(layer) for name, layer in part.items()}
        inner = "" if component == UNET else TEXT_MODEL
        if component == TEXT_ENCODER:
            inner = _installed_text_prefix()
        paths = {name: inner + split_name(name)[1] for name in part}
        tensors = _factor_tensors(
            part,
            lambda name, paths=paths: PEFT_PREFIX + paths[name],
            ("lora_A", "lora_B", ""),
            dtype,
        )
        full = {**metadata, **tensor_metadata(tensors, part)}
        # peft matches every suffix; only a whole path may match here.
        config = _config(part, paths)
        for patterns in ("rank_pattern", "alpha_pattern"):
            config[patterns] = {f"^{key}": value for key, value in config[patterns].items()}
        fixed = {"peft_type": "LORA", "bias": "none", "inference_mode": True}
        save_safetensors_atomic(tensors, folder / component / PEFT_WEIGHTS, full)
        write_json_atomic(folder / component / PEFT_CONFIG, {**fixed, **config})
    return folder


def _installed_text_prefix() -> str:
    """``text_model.`` where the installed transformers' CLIPTextModel has it (before version 5)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        config = CLIPTextConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        return TEXT_MODEL if hasattr(CLIPTextModel(config), "text_model") else ""
