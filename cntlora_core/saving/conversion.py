"""Adapters whose initialisation was taken out of the base weights, saved for the stock base."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cntlora_core.adapter.inject import AdapterPlan, alpha_of, anchored
from cntlora_core.adapter.record import (
    RECORD_FILE,
    Converted,
    InitializationRecord,
    OnRewrittenBase,
    is_marked,
)
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.lava.conversion import subtracted_lava
from cntlora_core.lava.factors import LavaPlan
from cntlora_core.lora_file.algebra import (
    LoRALayer,
    LoRALayers,
    alpha_for,
    compress_layers,
    subtract_initial_layers,
    total_relative_error,
)
from cntlora_core.lora_file.names import PEFT_PREFIX
from cntlora_core.lora_file.reading import PEFT_CONFIG, PEFT_WEIGHTS
from cntlora_core.runtime.files import (
    atomic_write,
    require_writable_folder,
    save_safetensors_atomic,
    write_json_atomic,
)
from cntlora_core.saving.record_reading import load_record

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
MODEL_CARD = "README.md"


@dataclass(frozen=True)
class ConversionReport:
    """What was saved.

    Attributes:
        path: The folder, for ``PeftModel.from_pretrained`` on the stock base.
        ranks: Rank of each layer as saved.
        trained_ranks: Rank of each layer while it was trained.
        relative_error: Frobenius error of the whole adapter from truncation; 0 for an exact one.
    """

    path: Path
    ranks: dict[str, int]
    trained_ranks: dict[str, int]
    relative_error: float


def save_converted(
    model: PeftModel,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    compress: bool = False,
) -> ConversionReport:
    """Save a trained adapter, in peft's layout, so that it fits the stock base model.

    Where the initialisation rewrote the base, the model holds ``W - s B0 A0``, and the file gets
    what training has added to the stock weight: ``s (B A - B0 A0) = s [B, -B0] @ [A; A0]``, exact
    at twice the rank, or cut back to the trained ranks. Elsewhere this is peft's
    ``save_pretrained``. The model stays as it is. In a process group, call it on one process.

    Args:
        model: A model with an adapter of LoRA or LAVA, initialised by this library or loaded by
            :func:`cntlora_core.load_initialized`.
        folder: Gets adapter_config.json, adapter_model.safetensors and a model card.
        adapter_name: Which adapter.
        compress: Truncate to the trained ranks (the best approximation of each layer; of a LAVA
            convolution one by alternating least squares).

    Raises:
        ValueError: if there is no such adapter, or it was added to a base that was rewritten for
            another one.
        OSError: as :func:`cntlora_core.runtime.files.atomic_write`.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"there is no adapter {adapter_name!r}; there are {[*model.peft_config]}")
    config = model.peft_config[adapter_name]
    if isinstance(config, OnRewrittenBase) and config.record is None:
        raise ValueError(
            f"adapter {adapter_name!r} was added to a base that had been rewritten for the "
            "initialisation of another adapter, so that it fits no other model"
        )
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=[adapter_name])
        saved = Path(temporary) / ("" if adapter_name == "default" else adapter_name)
        return _convert(saved, Path(folder), compress, Path(temporary) / MODEL_CARD)


def convert_adapter(
    source: str | Path, folder: str | Path, *, compress: bool = False
) -> ConversionReport:
    """Make an adapter for the stock base out of a saved one that fits a rewritten base.

    As :func:`save_converted`, from what ``model.save_pretrained`` or a Trainer's checkpoint holds;
    no model is needed. An adapter that fits the stock base is copied.

    Args:
        source: The folder with adapter_config.json.
        folder: Another folder; gets the converted adapter.
        compress: See :func:`save_converted`.

    Raises:
        FileNotFoundError: if a file of the adapter is missing.
        ValueError: if a file is damaged, files do not belong together, or both folders are one.
        OSError: as :func:`cntlora_core.runtime.files.atomic_write`.
    """
    source, folder = Path(source), Path(folder)
    if source.resolve() == folder.resolve():
        raise ValueError(f"the converted adapter would replace its source {source}: give another")
    return _convert(source, folder, compress, source / MODEL_CARD)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The JSON values of a saved adapter's configuration.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter in {folder}: {PEFT_CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(config).__name__}")
    return config


def _convert(source: Path, folder: Path, compress: bool, card: Path) -> ConversionReport:
    config = read_adapter_config(source)
    weights = source / PEFT_WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"there is no adapter in {source}: {PEFT_WEIGHTS} is missing")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from error
    if is_marked(config):
        record = load_record(source)
        try:
            converted, values = _subtracted(tensors, record, compress, config)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{weights} and {RECORD_FILE} beside it do not belong together: {error}"
            ) from error
        config |= values
    else:
        ranks = _ranks(tensors)
        converted = Converted(tensors, {}, ranks, ranks, 0.0)
    folder = require_writable_folder(folder)
    (folder / RECORD_FILE).unlink(missing_ok=True)  # of what was here before
    save_safetensors_atomic(converted.tensors, folder / PEFT_WEIGHTS, {"format": "pt"})
    write_json_atomic(folder / PEFT_CONFIG, config)
    if card.is_file() and not (folder / MODEL_CARD).exists():
        with atomic_write(folder / MODEL_CARD) as temporary:
            temporary.write_bytes(card.read_bytes())
    return ConversionReport(
        folder, converted.ranks, converted.trained_ranks, converted.relative_error
    )


def _subtracted(
    tensors: dict[str, Tensor],
    record: InitializationRecord,
    compress: bool,
    config: Mapping[str, Any],
) -> tuple[Converted, dict[str, Any]]:
    """The converted adapter, and the values of its configuration that differ."""
    if isinstance(record.plan, AdapterPlan):
        converted, field = _subtracted_lora(tensors, record.plan, compress), "init_lora_weights"
    else:
        assert isinstance(record.plan, LavaPlan)
        converted, field = subtracted_lava(tensors, record.plan, compress), "init_weights"
    root = config.get("use_rslora", False)
    return converted, {
        field: True,
        "rank_pattern": {anchored(name): rank for name, rank in converted.ranks.items()},
        "alpha_pattern": {
            anchored(name): alpha_of(converted.scalings[name], rank, root)
            for name, rank in converted.ranks.items()
        },
    }


def _subtracted_lora(tensors: dict[str, Tensor], plan: AdapterPlan, compress: bool) -> Converted:
    trained = {}
    for name, factors in plan.factors.items():
        down = tensors[PEFT_PREFIX + name + DOWN].float()
        up = tensors[PEFT_PREFIX + name + UP].float()
        trained[name] = LoRALayer(down, up, alpha_for(factors.scaling, down.shape[0]))
    exact = subtract_initial_layers(trained, _initial_layers(plan.factors, trained))
    trained_ranks = {name: layer.rank for name, layer in trained.items()}
    layers = compress_layers(exact, trained_ranks)[0] if compress else exact
    tensors = dict(tensors)
    for name, layer in layers.items():
        kept = tensors[PEFT_PREFIX + name + DOWN].dtype
        tensors[PEFT_PREFIX + name + DOWN] = layer.down.to(kept)
        tensors[PEFT_PREFIX + name + UP] = layer.up.to(kept)
    return Converted(
        tensors,
        {name: layer.scaling for name, layer in layers.items()},
        {name: layer.rank for name, layer in layers.items()},
        trained_ranks,
        total_relative_error(layers, exact) if compress else 0.0,
    )


def _initial_layers(factors: Mapping[str, Factors], like: LoRALayers) -> LoRALayers:
    """The initial layers in the trained ones' own shapes: kernels, for a convolution."""
    return {
        name: LoRALayer(
            f.down.reshape(-1, *like[name].down.shape[1:]),
            f.up.reshape(f.up.shape[0], f.rank, *like[name].up.shape[2:]),
            alpha_for(f.scaling, f.rank),
        )
        for name, f in factors.items()
    }


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Ranks of the layers of a file, LoRA's or LAVA's."""
    ranks = {}
    for key, tensor in tensors.items():
        for ending, dimension in ((DOWN, 0), (".lava_U", 1)):
            if key.endswith(ending):
                ranks[key.removeprefix(PEFT_PREFIX).removesuffix(ending)] = tensor.shape[dimension]
    return ranks
