"""The initialisation that was taken out of a base model's weights, kept beside the adapter.

Where an initialisation rewrites the base to ``W - scaling * B0 @ A0``, the adapter's weights mean
nothing on the stock base. The adapter's configuration is then a :class:`OnRewrittenBase`: whatever
saves the adapter through peft (``save_pretrained``, a Trainer's checkpoint) writes the record
beside it, and a configuration that peft refuses to load onto the stock base.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn

from cntlora_core.initialization.plan import AdapterPlan, Plan
from cntlora_core.runtime.tensor_file import write_tensors
from cntlora_core.runtime.thread_pool import map_in_threads

RECORD_FILE = "cntlora_initialization.safetensors"
FORMAT = "cntlora-initialization-1"
MARK = "cntlora:"
REFUSED = (
    f"{MARK} these weights fit a rewritten base model, not the stock one: make an adapter for the "
    "stock one with cntlora_core.convert_adapter, or load them with cntlora_core.load_initialized"
)
"""Stands in a saved configuration where the initialisation's name does; no peft knows it."""


@dataclass(frozen=True, eq=False)
class InitializationRecord:
    """What was taken out of a base model's weights, and which weights those were.

    Attributes:
        plan: The initial factors of every adapted layer, as the adapter took them: an
            :class:`AdapterPlan`, or the LavaPlan of LAVA.
        method: The name of the initialisation.
        fingerprints: By rewritten layer, :func:`fingerprint` of its weight before.
    """

    plan: Plan[Any]
    method: str
    fingerprints: dict[str, str]

    def __deepcopy__(self, _memo: dict[int, Any]) -> InitializationRecord:
        return self  # nothing in it ever changes, and a model's copy needs no copy of it

    def save(self, folder: str | Path) -> Path:
        """Write the record into a folder; returns the file's path.

        Raises:
            OSError: as :func:`cntlora_core.runtime.files.atomic_write`.
        """
        header = {
            "adapter": "lora" if isinstance(self.plan, AdapterPlan) else "lava",
            "method": self.method,
            "layers": self.plan.numbers(),
            "fingerprints": self.fingerprints,
        }
        return write_tensors(Path(folder) / RECORD_FILE, FORMAT, header, self.plan.tensors())


@dataclass(frozen=True)
class Converted:
    """An adapter for the stock base, in memory.

    Attributes:
        tensors: By their names in peft's file.
        scalings: By layer.
        ranks: By layer.
        trained_ranks: By layer.
        relative_error: Frobenius error of the whole adapter from truncation; 0 for an exact one.
    """

    tensors: dict[str, Tensor]
    scalings: dict[str, float]
    ranks: dict[str, int]
    trained_ranks: dict[str, int]
    relative_error: float


def fingerprint(weight: Tensor) -> str:
    """The data type, shape and SHA-256 of a weight's values; the same on every device."""
    kind = f"{str(weight.dtype).removeprefix('torch.')} {'x'.join(map(str, weight.shape))}"
    values = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return f"{kind} {hashlib.sha256(values.numpy()).hexdigest()}"  # pyright: ignore[reportArgumentType]


def fingerprints_of(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """:func:`fingerprint` of each module's weight, by name."""
    found = map_in_threads(lambda name: fingerprint(modules[name].weight), list(modules))  # pyright: ignore[reportArgumentType]
    return dict(zip(modules, found, strict=True))


class OnRewrittenBase:
    """A peft configuration of an adapter whose base model was rewritten.

    In this process it is like any other. What it saves is marked, so that peft refuses to load it
    onto the stock base: peft builds an adapter by the name of its initialisation, and knows no such
    one.

    Attributes:
        record: What was taken out of the base for this adapter; None for another adapter that was
            added afterwards, which cannot be converted.
    """

    initialization_field: str
    record: InitializationRecord | None = None

    @classmethod
    def of(cls, config: PeftConfig, record: InitializationRecord | None = None) -> Any:
        """A copy of a configuration, marked."""
        marked = cls.__new__(cls)
        marked.__dict__.update(copy.copy(config).__dict__)
        marked.record = record
        if record is not None:
            setattr(marked, cls.initialization_field, False)  # it is over
        return marked

    def _is_marked(self) -> bool:
        # peft's own conversion sets the field to True, for a file that fits the stock base.
        return self.record is None or getattr(self, self.initialization_field) is not True

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        return values | {self.initialization_field: REFUSED} if self._is_marked() else values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        if self.record is not None and self._is_marked():
            self.record.save(save_directory)
        super().save_pretrained(save_directory, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class LoraOnRewrittenBase(OnRewrittenBase, LoraConfig):
    """Of a LoRA."""

    initialization_field = "init_lora_weights"


class ConfigsOnRewrittenBase(dict[str, PeftConfig]):
    """The configurations of a model's adapters, by name, once its base was rewritten.

    Adding another adapter gives the warning that peft has for PiSSA, and marks it, too.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        if not isinstance(config, OnRewrittenBase):
            kinds = [type(known) for known in self.values() if isinstance(known, OnRewrittenBase)]
            warnings.warn(
                "the base weights of this model were rewritten for the initialisation of another "
                f"adapter, so that adapter {name!r} will fit no other model: train it on the stock "
                "base, and load the adapter that cntlora_core.save_converted has saved beside it",
                stacklevel=3,
            )
            config = (kinds[0] if kinds else LoraOnRewrittenBase).of(config)
        super().__setitem__(name, config)


def remember_rewriting(
    model: PeftModel,
    adapter_name: str,
    record: InitializationRecord,
    kind: type[OnRewrittenBase] = LoraOnRewrittenBase,
) -> None:
    """Mark a model whose base weights have just been rewritten for one of its adapters."""
    configs = ConfigsOnRewrittenBase(model.peft_config)
    configs[adapter_name] = kind.of(model.peft_config[adapter_name], record)
    model.peft_config = configs
    model.get_base_model().peft_config = configs  # pyright: ignore[reportArgumentType]


def base_is_rewritten(model: PeftModel) -> bool:
    return isinstance(model.peft_config, ConfigsOnRewrittenBase)


def record_of(model: PeftModel, adapter_name: str = "default") -> InitializationRecord | None:
    """What was taken out of a model's base for an adapter; None where nothing was."""
    config = model.peft_config[adapter_name]
    return config.record if isinstance(config, OnRewrittenBase) else None


def is_marked(config: Mapping[str, Any]) -> bool:
    """Whether a saved configuration is one of an adapter that fits a rewritten base only."""
    values = (config.get("init_lora_weights"), config.get("init_weights"))
    return any(isinstance(value, str) and value.startswith(MARK) for value in values)
