"""The modes of models: training or evaluating."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode within the block; then every module has the mode that it had before."""
    before = [{name: m.training for name, m in model.named_modules()} for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, modes in zip(models, before, strict=True):
            for name, module in model.named_modules():
                module.training = modes.get(name, module.training)
