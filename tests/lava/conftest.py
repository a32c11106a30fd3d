"""Small nets with every kind of module that LAVA adapts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core.lava import LavaConfig, LavaLayer

NAMES = ["first", "second", "short", "line", "turned", "head"]


class Net(nn.Module):
    """Convolutions of two kinds and sizes, a linear layer and transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Conv2d(3, 6, (3, 2), padding="same")
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, padding_mode="reflect")
        self.short = nn.Conv2d(6, 8, 1, stride=2)
        self.line = nn.Conv1d(8, 5, 3, padding=2, dilation=2)
        self.turned = Conv1D(6, 5)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.second(h)) + self.short(h)
        h = torch.tanh(self.line(h.flatten(2))).mean(2)
        return self.head(torch.tanh(self.turned(h)))


def config(**options) -> LavaConfig:
    return LavaConfig(**{"r": 3, "lava_alpha": 6, "target_modules": NAMES, **options})


def layers(model: nn.Module) -> dict[str, LavaLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LavaLayer)
    }


def trained(model: nn.Module, x: torch.Tensor, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def make_net() -> type[Net]:
    return Net


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1))
