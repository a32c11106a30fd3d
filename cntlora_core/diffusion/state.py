"""The state of an interrupted run: one safetensors file, replaced as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.runtime.files import save_safetensors_atomic
from cntlora_core.runtime.reading import is_finite, json_object, reading

if TYPE_CHECKING:
    from cntlora_core.diffusion.adapters import Plan

FORMAT = "cntlora-training-state-1"


@dataclass(frozen=True)
class TrainingState:
    """All that a run needs to go on as if it had not stopped.

    Attributes:
        step: Optimizer steps done.
        plan: The start of every adapter (also what an export subtracts).
        parameters: By ``<point>.down`` and ``<point>.up``, with LAVA by ``<point>.U`` and so on,
            float32.
        moments: AdamW's ``exp_avg`` and ``exp_avg_sq``, by ``<kind>.`` and the same.
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
        tensors = {f"parameter.{n}": t for n, t in self.parameters.items()}
        tensors |= {f"moment.{n}": t for n, t in self.moments.items()}
        for name, factors in self.plan.factors.items():
            tensors |= {f"initial.{name}.{key}": t for key, t in factors.named().items()}
        header = {
            "step": self.step,
            "history": self.history,
            "settings": self.settings,
            "extra": self.extra,
            "adapter": "lora" if isinstance(self.plan, AdapterPlan) else "lava",
            "rewrites_base": self.plan.rewrites_base,
            "points": {n: [f.scaling, f.filled] for n, f in self.plan.factors.items()},
        }
        metadata = {"format": FORMAT, "header": json.dumps(header)}
        save_safetensors_atomic(tensors, path, metadata)

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
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path} is no training state of this version (its format is "
                        f"{metadata.get('format')!r}, not {FORMAT!r}); start anew with --overwrite"
                    )
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            header = json_object(metadata["header"])
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
        initial = {
            f"{name}.{key}": tensor
            for name, factors in self.plan.factors.items()
            for key, tensor in factors.named().items()
        }
        if not initial or initial.keys() != self.parameters.keys():
            raise ValueError("its parameters are not those of its start")
        wanted = {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in initial}
        if not self.moments.keys() <= wanted:
            raise ValueError("its optimizer's moments are not those of its parameters")
        for found in (self.parameters, self.moments):
            for name, tensor in found.items():
                start = initial[name.removeprefix("exp_avg_sq.").removeprefix("exp_avg.")]
                fits = tensor.shape == start.shape and tensor.ndim in (2, 4)
                if not fits or tensor.dtype != torch.float32:
                    raise ValueError(f"{name} has another shape or type than its start")
                if not is_finite(tensor):
                    raise ValueError(f"{name} has values that are not finite")


def steps_done(path: Path) -> int:
    """The steps of a state's run; its tensors are not read.

    Raises:
        ValueError: if the file is no state of this library.
    """
    with reading(path, "a training state"), safe_open(str(path), framework="pt") as file:
        return int(json_object((file.metadata() or {})["header"])["step"])


def _plan_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    def initial(name: str, *keys: str) -> list[Tensor]:
        found = (tensors.get(f"initial.{name}.{key}") for key in keys)
        return [tensor for tensor in found if tensor is not None]

    points, rewrites_base = header["points"], header["rewrites_base"]
    if header.get("adapter", "lora") == "lora":
        factors = {}
        for name, rest in points.items():
            down, up = initial(name, "down", "up")
            factors[name] = Factors(down, up, *rest)
        return AdapterPlan(factors, rewrites_base)
    from cntlora_core.lava.factors import LavaFactors, LavaPlan

    terms = {}
    for name, (scaling, filled) in points.items():
        u, v, *spatial = initial(name, "U", "V", "Y", "X")
        terms[name] = LavaFactors(u, v, tuple(spatial), scaling, filled)
    return LavaPlan(terms, rewrites_base)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors.values())
