"""Layouts of known convolutional networks, at any width.

ResNet and ConvNeXt are transformers' own classes; VGG-11 (arXiv 1409.1556), AlexNet (Krizhevsky et
al., 2012) and GoogLeNet (arXiv 1409.4842) are written out, with batch normalisation in the latter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

from cntlora_core.benchmark.lava.settings import ModelName


class Network(nn.Module):
    """Features, and a linear head on them, which is called ``head``."""

    def __init__(self, features: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, s, s) in -1..1 -> (n, classes)."""
        return self.head(self.features(x))


class _Pooled(nn.Module):
    """What a model of transformers pools, as (n, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).pooler_output.flatten(1)


class _Branches(nn.Module):
    """Modules side by side, their outputs joined."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def build_network(name: ModelName, classes: int, width: float) -> Network:
    """A network with fresh weights, by torch's global generator.

    Args:
        name: Whose layout.
        classes: Outputs of the head.
        width: Channels as a part of the published ones; 8 at the least.
    """

    def scaled(channels: int) -> int:
        return max(8, round(channels * width / 8) * 8)

    if name in ("resnet18", "resnet34"):
        sizes = [scaled(n) for n in (64, 128, 256, 512)]
        config = ResNetConfig(
            embedding_size=sizes[0],
            hidden_sizes=sizes,
            depths=[2, 2, 2, 2] if name == "resnet18" else [3, 4, 6, 3],
            layer_type="basic",
        )
        return Network(_Pooled(ResNetModel(config)), sizes[-1], classes)
    if name == "convnext":
        sizes = [scaled(n) for n in (96, 192, 384, 768)]
        shape = ConvNextConfig(hidden_sizes=sizes, depths=[3, 3, 9, 3], drop_path_rate=0.0)
        return Network(_Pooled(ConvNextModel(shape)), sizes[-1], classes)
    features, last = {"vgg11": _vgg11, "alexnet": _alexnet, "googlenet": _googlenet}[name](scaled)
    network = Network(features, last, classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def _vgg11(scaled) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = []
    before = 3
    for channels in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if channels == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(before, scaled(channels), 3, padding=1), nn.ReLU()]
        before = scaled(channels)
    return _with_hidden(layers, before, scaled(4096) // 4)


def _alexnet(scaled) -> tuple[nn.Module, int]:
    a, b, c, d = (scaled(n) for n in (64, 192, 384, 256))
    layers = [
        nn.Conv2d(3, a, 11, stride=4, padding=5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(a, b, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(d, d, 3, padding=1), nn.ReLU()),
    ]
    return _with_hidden(layers, d, scaled(4096) // 4)


def _with_hidden(layers: list[nn.Module], channels: int, hidden: int) -> tuple[nn.Module, int]:
    pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    dense = [nn.Linear(4 * channels, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, *pooled, *dense), hidden


_INCEPTIONS = (
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None,
    (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128), None,
    (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
)  # fmt: skip
"""Channels of each inception: 1x1; before 3x3, 3x3; before 5x5, 5x5; after pooling. None: pool."""


def _googlenet(scaled) -> tuple[nn.Module, int]:
    def convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())

    before = scaled(192)
    layers: list[nn.Module] = [
        convolution(3, scaled(64), 7, 2),
        nn.MaxPool2d(3, 2, padding=1),
        convolution(scaled(64), scaled(64), 1),
        convolution(scaled(64), before, 3),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    for numbers in _INCEPTIONS:
        if numbers is None:
            layers.append(nn.MaxPool2d(3, 2, padding=1))
            continue
        one, to_three, three, to_five, five, pooled = (scaled(n) for n in numbers)
        layers.append(
            _Branches(
                [
                    convolution(before, one, 1),
                    nn.Sequential(
                        convolution(before, to_three, 1), convolution(to_three, three, 3)
                    ),
                    nn.Sequential(convolution(before, to_five, 1), convolution(to_five, five, 3)),
                    nn.Sequential(nn.MaxPool2d(3, 1, padding=1), convolution(before, pooled, 1)),
                ]
            )
        )
        before = one + three + five + pooled
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), before


def adapted_modules(network: nn.Module) -> dict[str, nn.Module]:
    """What gets adapters, by name: all convolutions, or the linear layers that a network names."""
    endings = getattr(network, "adapted_endings", None)
    return {
        name: module
        for name, module in network.named_modules()
        if (isinstance(module, nn.Conv2d) if endings is None else name.endswith(endings))
    }


class TextNetwork(nn.Module):
    """An encoder, the mean of its token states, and a linear head."""

    adapted_endings = (".query", ".key", ".value")

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, length), 0 where there is no token -> (n, classes)."""
        mask = tokens != 0
        longest = int(mask.sum(1).max())
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        states = self.encoder(input_ids=tokens, attention_mask=mask.long())[0]
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
