"""Many processes that each read a part of the data: they agree, add up, and fail together.

Everything here is a collective call: all processes of the default group of torch.distributed make
it, in the same order. With one process it does nothing but pass values through.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cntlora_core.runtime.launching import OtherProcessError, launched
from cntlora_core.runtime.reading import lacks_memory

Value = TypeVar("Value")


class Processes:
    """The processes that work on one thing together.

    Args:
        joined: Whether to work with the other processes of torch.distributed's default group, where
            one is initialised; False for a process that works by itself.
    """

    def __init__(self, joined: bool = True) -> None:
        active = joined and dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if active else 1
        self.rank = dist.get_rank() if active else 0

    @property
    def together(self) -> bool:
        return self.count > 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The small picklable values of all processes, by rank, on every process."""
        if not self.together:
            return [value]
        values: list[Any] = [None] * self.count
        with _connected():
            dist.all_gather_object(values, value)
        return values

    def run(self, work: Callable[[], Value], doing: str) -> Value:
        """Do some work on every process, and raise on all of them if it fails on any.

        Args:
            work: Must make no collective call.
            doing: What it is, for the others' message.

        Raises:
            BaseException: what ``work`` raised here.
            OtherProcessError: if it failed on another process.
        """
        result, error = attempt(work)
        self.raise_together(error, doing)
        return result  # pyright: ignore[reportReturnType]

    def first_before_others(self, work: Callable[[], Value], doing: str) -> Value:
        """As :meth:`run`, the first process before all others: they find what it left on disk."""
        result, error = attempt(work) if self.first else (None, None)
        self.raise_together(error, doing)
        if not self.first:
            result, error = attempt(work)
        if self.together:
            self.raise_together(error, doing)
        return result  # pyright: ignore[reportReturnType]

    def raise_together(self, error: BaseException | None, doing: str) -> None:
        """Raise ``error`` where it happened, an OtherProcessError that quotes it everywhere else.

        Where it is a KeyboardInterrupt, that is raised everywhere.
        """
        stops = isinstance(error, KeyboardInterrupt)
        seen = self.gather(None if error is None else (stops, f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, said in enumerate(seen):
            if said is not None and said[0]:
                raise KeyboardInterrupt
            if said is not None:
                raise OtherProcessError(
                    f"process {rank} failed while {doing}, and process {self.rank} stops with it: "
                    f"{said[1]}"
                )

    def require_same(self, value: str, what: str) -> None:
        """Refuse to go on where the processes were given different things.

        Raises:
            ValueError: on every process.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"process {rank} was given another {what} than process 0: {other[:300]} "
                    f"against {values[0][:300]}"
                )

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place where the tensor is where the group can reach it."""
        there = tensor.to(self._device()).contiguous()
        with _connected():
            dist.all_reduce(there)
        return there.to(tensor.device)

    def add_up_all(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one data type over processes, in place and in one message."""
        flat = self.add_up(torch.cat([tensor.flatten() for tensor in tensors]))
        sums = flat.split([tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total.view_as(tensor))

    def from_first(self, tensor: Tensor | None, shape: Sequence[int]) -> Tensor:
        """A float32 tensor of the first process, on the CPU of every process."""
        if tensor is None:
            tensor = torch.empty(*shape)
        there = tensor.to(self._device(), torch.float32).contiguous()
        with _connected():
            dist.broadcast(there, 0)
        return there.cpu()

    def _device(self) -> torch.device:
        if "nccl" in dist.get_backend():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@contextmanager
def _connected() -> Iterator[None]:
    """Says of an error of the connection that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if lacks_memory(error):
            raise
        raise OtherProcessError(
            f"another process has ended without a word, and this one stops with it ({error})"
        ) from error


def attempt(work: Callable[[], Value]) -> tuple[Value | None, BaseException | None]:
    """The result of some work, or the error that it ended with; Ctrl-C is one too."""
    try:
        return work(), None
    except BaseException as error:
        return None, error


def require_devices(count: int, device: str | None) -> None:
    """Refuse more processes than there are GPUs, or one GPU for several processes.

    Args:
        count: Processes of this machine.
        device: As a user named it; None for the default.

    Raises:
        ValueError: with what to use instead.
    """
    if count == 1 or device == "cpu":
        return
    if device not in (None, "cuda"):
        raise ValueError(
            f"each of {count} processes takes a GPU of its own, and device={device!r} is one for "
            "all: leave --device out, or use --device cpu"
        )
    found = torch.cuda.device_count()
    if count > found:
        there = f"{found} GPU{'s' if found != 1 else ''}" if found else "no GPU"
        fewer = f"at most {found} processes" if found > 1 else "one process"
        raise ValueError(
            f"{count} processes need a GPU each, and this machine has {there}: use {fewer}, or "
            "--device cpu"
        )


@contextmanager
def joined(device: str | None) -> Iterator[Processes]:
    """Within the block this process works with the others of its launcher, if there are any.

    Args:
        device: As a user named it; on CUDA each process takes the GPU of its local rank.

    Raises:
        ValueError: as :func:`require_devices`.
    """
    if not launched() or dist.is_initialized():
        yield Processes()
        return
    require_devices(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])), device)
    on_gpus = device != "cpu"
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    # What is said of steps and errors goes from CPU to CPU, and waits for no GPU. The others wait
    # long where the first generates class images; the launcher ends them if it dies.
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    try:
        yield Processes()
    finally:
        dist.destroy_process_group()
