"""How much of a training step is in memory at a time, and using less where that is too much."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from cntlora_core.runtime.reading import lacks_memory

Result = TypeVar("Result")


@dataclass
class MemoryUse:
    """What a step trades time for memory with; the numbers that it computes stay the same.

    Attributes:
        checkpointing: Whether activations are computed again in the backward pass.
        at_once: How many samples of a batch pass through the models together; None for all.
    """

    checkpointing: bool = False
    at_once: int | None = None

    def parts(self, places: Sequence[int]) -> Iterator[Sequence[int]]:
        """The places of a batch's samples, as many at a time as pass together."""
        size = self.at_once or max(len(places), 1)
        for start in range(0, len(places), size):
            yield places[start : start + size]

    def lower(self, samples: int) -> str | None:
        """Use less memory from now on.

        Args:
            samples: How many a batch has.

        Returns:
            What is done from now on, in words; None where nothing is left to do.
        """
        if not self.checkpointing:
            self.checkpointing = True
            return "with gradient checkpointing"
        now = min(self.at_once or samples, samples)
        if now < 2:
            return None
        self.at_once = (now + 1) // 2
        together = f"{self.at_once} at a time" if self.at_once > 1 else "one by one"
        return f"with the {samples} photos and class images of a batch passing {together}"


def with_less_memory(work: Callable[[], Result], lower: Callable[[], bool]) -> Result:
    """Do some work, and do it again with less memory whenever there is not enough.

    Args:
        work: Can be begun again from the start after it has failed.
        lower: Makes it use less; False where it cannot.

    Raises:
        Exception: what ``work`` raised, where ``lower`` could do no more or memory was not lacking.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not lacks_memory(error) or not lower():
                raise
        give_memory_back()  # only now: the error holds the frames of the work


def give_memory_back() -> None:
    """Collect what frames and caches hold of the memory, once they are no longer needed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def checkpoint_gradients(unet: Any, text_encoders: Sequence[Any]) -> None:
    """Let the networks compute their activations again in the backward pass."""
    unet.enable_gradient_checkpointing()
    for text_encoder in text_encoders:
        renamed = getattr(text_encoder, "activation_checkpointing_enable", None)  # transformers 5
        # The reentrant kind gives no gradients where the input (the frozen embeddings) needs none.
        (renamed or text_encoder.gradient_checkpointing_enable)({"use_reentrant": False})
