"""What the training scripts share: the loop, a schedule by the clock, EMA, states on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open

from cntlora_core.mini.making.muon import Muon
from cntlora_core.runtime.files import save_safetensors_atomic
from cntlora_core.runtime.memory import keep_freed_memory

__all__ = [
    "Budget",
    "ExponentialAverage",
    "RunLog",
    "Schedule",
    "SharedWork",
    "load_state",
    "optimise",
    "save_state",
]


_LONGEST_STEP = 20.0


@dataclass
class Budget:
    """How much of a run is done, by minutes of training or by steps.

    Attributes:
        minutes: length of the whole run, over all resumptions.
        steps: if given, the run ends after so many steps whatever the clock says; this is how a
            run that was timed is repeated exactly.
        elapsed: seconds of training so far.
        step: steps done so far.
    """

    minutes: float
    steps: int | None = None
    elapsed: float = 0.0
    step: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        self._last = time.monotonic()

    def advance(self) -> None:
        """Count one step."""
        now = time.monotonic()
        self.elapsed += min(now - self._last, _LONGEST_STEP)  # a suspended process is not training
        self._last = now
        self.step += 1

    def skip(self) -> None:
        """Leave out the time since the last step (sampling, saving)."""
        self._last = time.monotonic()

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        return min(1.0, self.elapsed / (60 * self.minutes))

    def learning_rate(self, peak: float, warmup_steps: int, decay_from: float) -> float:
        """Learning rate: linear warm-up, constant, cosine to nearly zero from ``decay_from`` on."""
        warm = min(1.0, (self.step + 1) / warmup_steps)
        tail = max(0.0, (self.progress - decay_from) / (1 - decay_from))
        cosine = 0.5 * (1 + torch.cos(torch.tensor(tail * torch.pi)).item())
        return peak * warm * max(cosine, 0.01)

    def describe(self) -> str:
        """``"step 120 · 35 % · 12 min left"``."""
        share = max(self.progress, 1e-6)
        left = self.elapsed / share * (1 - share) / 60
        return f"step {self.step} · {100 * share:.1f} % · {left:.1f} min left"


class ExponentialAverage:
    """Moving average of parameters; the decay grows with the steps up to its limit.

    Args:
        parameters: name -> parameter.
        decay: limit of the decay per step.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], step: int) -> None:
        """Move the average towards ``parameters``; ``step`` counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.shadow.values()), [parameters[n].detach() for n in self.shadow], 1 - decay
        )


class Schedule(Protocol):
    """What a script's config says of its optimiser.

    Attributes:
        rate: peak learning rate of AdamW.
        warmup_steps: steps of linear warm-up.
        decay_from: part of the run after which the learning rate falls.
        ema: decay of the averaged weights.
        seed: of weights, data order and noise.
    """

    @property
    def rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_from(self) -> float: ...
    @property
    def ema(self) -> float: ...
    @property
    def seed(self) -> int: ...


class SharedWork:
    """Gradients of a batch, its parts worked on side by side by processes of one thread each.

    The parts meet once a step and not after every operation, which keeps pace far better than
    threads do when others use the machine too. Parameters lie in shared memory.

    Args:
        workers: number of parts; the calling process does the first.
        loss: picklable; of the parts of a batch's tensors, a mean over samples.
        parameters: what to differentiate by.
    """

    def __init__(
        self,
        workers: int,
        loss: Callable[..., torch.Tensor],
        parameters: Sequence[torch.nn.Parameter],
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        torch.set_num_threads(1)
        self._loss, self._parameters = loss, list(parameters)
        self._helpers: list[tuple[Connection, list[torch.Tensor]]] = []
        context = torch.multiprocessing.get_context("spawn")
        for parameter in self._parameters if workers > 1 else ():
            parameter.data.share_memory_()
        for _ in range(workers - 1):
            sums = [torch.zeros_like(p.data).share_memory_() for p in self._parameters]
            here, there = context.Pipe()
            arguments = (there, loss, self._parameters, sums)
            context.Process(target=_help, args=arguments, daemon=True).start()
            there.close()
            self._helpers.append((here, sums))

    def backward(self, batch: Sequence[torch.Tensor]) -> float:
        """Set the parameters' ``grad`` to that of the mean loss; returns the loss.

        Args:
            batch: tensors of one length, which the number of workers divides.
        """
        parts = list(zip(*(t.chunk(len(self._helpers) + 1) for t in batch), strict=True))
        for (pipe, _), part in zip(self._helpers, parts[1:], strict=True):
            pipe.send([tensor.numpy() for tensor in part])
        value = self._loss(*parts[0])
        total = list(torch.autograd.grad(value, self._parameters))
        losses = [value.item()]
        for pipe, gradients in self._helpers:
            losses.append(pipe.recv())
            torch._foreach_add_(total, gradients)
        torch._foreach_div_(total, len(parts))
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient
        return sum(losses) / len(losses)


def _help(
    pipe: Connection,
    loss: Callable[..., torch.Tensor],
    parameters: list[torch.nn.Parameter],
    gradients: list[torch.Tensor],
) -> None:
    """Work of a helping process: parts of batches come in, gradients go to shared memory."""
    os.setsid()  # kernels that share time out by session then count every process
    torch.set_num_threads(1)
    keep_freed_memory()
    while True:
        try:
            part = pipe.recv()
        except EOFError:
            return
        value = loss(*(torch.from_numpy(array) for array in part))
        for kept, gradient in zip(gradients, torch.autograd.grad(value, parameters), strict=True):
            kept.copy_(gradient)
        pipe.send(value.item())


class RunLog:
    """Lines of JSON, one a report, to draw the loss curve from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **values: float | int | str) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def optimise(
    output: Path,
    named: dict[str, torch.nn.Parameter],
    loss: Callable[..., torch.Tensor],
    batch_of: Callable[[int], Sequence[torch.Tensor]],
    schedule: Schedule,
    budget: Budget,
    on_save: Callable[[ExponentialAverage], None],
    *,
    workers: int = 2,
    every: float = 180,
    report_every: int = 50,
    muon: bool = False,
) -> None:
    """Minimise ``loss`` until the budget is spent; ``output/state.safetensors`` resumes it.

    Args:
        output: folder of state and log.
        named: what is trained.
        loss: picklable; of a batch's tensors, a mean over samples.
        batch_of: tensors of a step; torch's global generator is seeded before each call, so that
            the same step gives the same batch.
        schedule: rates and seed.
        budget: minutes or steps.
        on_save: called with the averaged weights whenever a state was written, at the end too.
        workers: processes that share a batch.
        every: seconds between states.
        report_every: steps between two lines of the log.
        muon: Muon for matrices and kernels, AdamW for the rest only.
    """
    average = ExponentialAverage(named, schedule.ema)
    optimizers = _optimizers(named, schedule.rate, muon)
    work = SharedWork(workers, loss, list(named.values()))
    groups = {"model": dict(named), "ema": average.shadow}
    state, log = output / "state.safetensors", RunLog(output / "log.jsonl")
    if state.is_file():
        load_state(state, groups, optimizers, named, budget)
        print(f"resumed: {budget.describe()}", flush=True)
    saved, losses = budget.elapsed, []
    budget.skip()
    while budget.progress < 1:
        torch.manual_seed(schedule.seed * 1_000_003 + budget.step)
        learning_rate = budget.learning_rate(
            schedule.rate, schedule.warmup_steps, schedule.decay_from
        )
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate
        losses.append(work.backward(batch_of(budget.step)))
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        budget.advance()
        average.update(named, budget.step)
        if budget.step % report_every == 0:
            mean = float(np.mean(losses))
            log.write(
                step=budget.step, loss=mean, rate=learning_rate, seconds=round(budget.elapsed, 1)
            )
            print(f"{budget.describe()} · loss {mean:.4f}", flush=True)
            losses = []
        if budget.elapsed - saved > every or budget.progress >= 1:
            save_state(state, groups, optimizers, named, budget)
            on_save(average)
            saved = budget.elapsed
            budget.skip()


# Parts whose weights are looked up, or meet pixels and latents: AdamW's even with Muon.
_OUTER = ("embedding", "conv_in", "conv_out", "quant_conv")


def _optimizers(
    named: Mapping[str, torch.nn.Parameter], learning_rate: float, muon: bool
) -> list[torch.optim.Optimizer]:
    """AdamW, and with ``muon`` a Muon for the inner matrices and kernels."""
    inner = {n for n, p in named.items() if muon and p.dim() > 1 and not _is_outer(n)}
    rest = [p for n, p in named.items() if n not in inner]
    adamw = torch.optim.AdamW(
        rest, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    return (
        [adamw, Muon([named[n] for n in named if n in inner], learning_rate)] if inner else [adamw]
    )


def _is_outer(name: str) -> bool:
    return any(part in name for part in _OUTER)


def save_state(
    path: Path,
    groups: dict[str, dict[str, torch.Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    named: Mapping[str, torch.nn.Parameter],
    budget: Budget,
) -> None:
    """Write all a resumption needs as one safetensors file, atomically.

    Args:
        path: the file.
        groups: prefix -> name -> tensor, e.g. ``{"model": ..., "ema": ...}``.
        optimizers: over the parameters, each in one of them.
        named: name -> parameter.
        budget: time and steps so far.
    """
    tensors = {
        f"{prefix}/{name}": tensor.detach().contiguous()
        for prefix, group in groups.items()
        for name, tensor in group.items()
    }
    for name, parameter in named.items():
        for key, value in _owner(optimizers, parameter).state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = value.detach().contiguous()
    metadata = {"elapsed": repr(budget.elapsed), "step": str(budget.step)}
    save_safetensors_atomic(tensors, path, metadata)


def load_state(
    path: Path,
    groups: dict[str, dict[str, torch.Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    named: Mapping[str, torch.nn.Parameter],
    budget: Budget,
) -> None:
    """Inverse of :func:`save_state`; tensors in ``groups`` are filled in place."""
    with safe_open(path, "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    with torch.no_grad():
        for prefix, group in groups.items():
            for name, tensor in group.items():
                tensor.copy_(stored[f"{prefix}/{name}"])
    for key, value in stored.items():
        if key.startswith("optimizer/"):
            _, field, name = key.split("/", 2)
            parameter = named[name]
            if value.dim():  # the moments lie in memory as their parameter does
                value = torch.empty_like(parameter.detach()).copy_(value)
            _owner(optimizers, parameter).state[parameter][field] = value
    budget.elapsed, budget.step = float(metadata["elapsed"]), int(metadata["step"])
    budget.skip()


def _owner(
    optimizers: Sequence[torch.optim.Optimizer], parameter: torch.nn.Parameter
) -> torch.optim.Optimizer:
    """The one that a parameter belongs to."""
    return next(
        optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(parameter is other for other in group["params"])
    )
