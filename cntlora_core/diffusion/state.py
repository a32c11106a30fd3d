"""The state of an interrupted run: one safetensors file, replaced as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.runtime.reading import is_finite, json_object, reading
from cntlora_core.runtime.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from cntlora_core.diffusion.adapters import Plan

FORMAT = "cntlora-training-state-2"


@dataclass(frozen=True)
class TrainingState:
    """All that a run needs to go on as if it had not stopped.

    Attributes:
        step: Optimizer steps done.
        plan: The initialisation of every adapter (also what an export subtracts).
        parameters: By ``<point>.down`` and ``<point>.up``, with LAVA by ``<point>.U`` and so on,
            float32.
        moments: The tensors of the optimiser's state, such as AdamW's ``exp_avg``, by ``<kind>.``
            and the same.
        history: One record per step: loss, prior loss, gradient norm, learning rate.
        settings: The settings of the run as JSON values, to compare with those of a resumed one.
        extra: Anything small that must survive, such as the loss scale.
    """

    step: int
    plan: Plan
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    history: list[dict[str, float]]
    settings: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the state; at any moment the file is the old one or the new one."""
        parts = {
            "parameter": self.parameters,
            "moment": self.moments,
            "initial": self.plan.tensors(),
        }
        tensors = {f"{part}.{n}": t for part, of in parts.items() for n, t in of.items()}
        header = {
            "step": self.step,
            "history": self.history,
            "settings": self.settings,
            "extra": self.extra,
            "adapter": "lora" if isinstance(self.plan, AdapterPlan) else "lava",
            "rewrites_base": self.plan.rewrites_base,
            "points": {n: [f.scaling, f.filled] for n, f in self.plan.factors.items()},
        }
        write_tensors(path, FORMAT, header, tensors)

    @classmethod
    def load(cls, path: Path) -> TrainingState:
        """Read a state back.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is no state of this library.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"there is nothing to resume: {path} does not exist; start without --resume"
            )
        with reading(path, "a training state", "Start anew with --overwrite."):
            header, tensors = read_tensors(path, FORMAT)
            state = cls(
                step=header["step"],
                plan=_plan_of(header, tensors),
                parameters=_under(tensors, "parameter."),
                moments=_under(tensors, "moment."),
                history=header["history"],
                settings=header["settings"],
                extra=header["extra"],
            )
            state._require_whole()
            return state

    def _require_whole(self) -> None:
        """Raises ValueError where the parts of a state that was read do not belong together."""
        if type(self.step) is not int or self.step < 0:
            raise ValueError(f"its step is {self.step!r}")
        if type(self.plan.rewrites_base) is not bool:
            raise ValueError(f"rewrites_base is {self.plan.rewrites_base!r}")
        for name, kind in (("history", list), ("settings", dict), ("extra", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"its {name} is no {kind.__name__}")
        initial = self.plan.tensors()
        if not initial or initial.keys() != self.parameters.keys():
            raise ValueError("its parameters are not those of its initialisation")
        if not {name.partition(".")[2] for name in self.moments} <= initial.keys():
            raise ValueError("its optimiser's tensors are not those of its parameters")
        for name, tensor in self.parameters.items():
            if not _fits(tensor, initial[name]) or tensor.dtype != torch.float32:
                raise ValueError(f"{name} has another shape or type than its initialisation")
        for name, tensor in self.moments.items():
            kind, _, parameter = name.partition(".")
            if kind.startswith("exp_avg") and not _fits(tensor, initial[parameter]):
                raise ValueError(f"{name} has another shape than its parameter")
        for name, tensor in (*self.parameters.items(), *self.moments.items()):
            if tensor.is_floating_point() and not is_finite(tensor):
                raise ValueError(f"{name} has values that are not finite")


def _fits(tensor: Tensor, initial: Tensor) -> bool:
    """Whether shapes agree; a plan may hold the kernel of a convolution as a matrix."""
    return tensor.ndim in (2, 4) and tensor.flatten(1).shape == initial.flatten(1).shape


def steps_done(path: Path) -> int:
    """The steps of a state's run; its tensors are not read.

    Raises:
        ValueError: if the file is no state of this library.
    """
    with reading(path, "a training state"), safe_open(str(path), framework="pt") as file:
        return int(json_object((file.metadata() or {})["header"])["step"])


def _plan_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    numbers = {n: {"scaling": s, "filled": filled} for n, (s, filled) in header["points"].items()}
    kind = AdapterPlan
    if header.get("adapter", "lora") != "lora":
        from cntlora_core.lava.factors import LavaPlan as kind
    return kind.of(numbers, _under(tensors, "initial."), header["rewrites_base"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors.values())
