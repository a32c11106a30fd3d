"""LAVA on a convolutional network: a peft method whose factors keep the kernel's dimensions.

python docs/examples/lava_convnet.py      # a small network with random weights; seconds
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from cntlora_core.lava import LavaConfig, orthogonality_loss


class ConvNet(nn.Module):
    """Two convolutions and a head, for images of 3 channels."""

    def __init__(self, width: int = 16, classes: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.conv2(F.relu(self.conv1(images))))
        return self.head(features.mean((2, 3)))


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 3, 16, 16) of horizontal (0) or vertical (1) stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    horizontal = torch.sin(torch.arange(16.0) * 1.5)[:, None].expand(3, 16, 16)
    clean = torch.where(labels[:, None, None, None] == 0, horizontal, horizontal.mT)
    return clean + 0.5 * torch.randn(count, 3, 16, 16, generator=generator), labels


def main(steps: int = 150) -> float:
    """Train the adapters and the head; return the accuracy on new images."""
    torch.manual_seed(0)
    config = LavaConfig(
        r=4, lava_alpha=4, target_modules=["conv1", "conv2"], modules_to_save=["head"]
    )
    model = get_peft_model(ConvNet(), config)
    model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(steps):
        images, labels = stripes(32, seed=step)
        loss = F.cross_entropy(model(images), labels) + orthogonality_loss(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    images, labels = stripes(200, seed=10_000)
    with torch.inference_mode():
        return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    print(f"accuracy {main():.1%}")
