"""Models to train, each with a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Step = Callable[[], object]


class Task(NamedTuple):
    """A model with a batch."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def to(self, device: str) -> Task:
        """The same there."""
        return Task(self.model.to(device), self.inputs.to(device), self.targets.to(device))


def cnn() -> Task:
    """Four convolutions with BatchNorm on 32 images of 32 by 32."""
    widths = (3, 32, 64, 128, 256)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        convolution = nn.Conv2d(into, out, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * widths[-1], 10))
    return Task(model, torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))


def transformer() -> Task:
    """Four layers of width 128 on 8 sequences of 64."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return Task(nn.Sequential(model, nn.Linear(128, 10)), *_sequences())


def _sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 64, 128), torch.randint(10, (8, 64))


def resnet50(size: int = 128) -> Task:
    """ResNet-50 on 8 images, square. The smaller they are, the more its weights count."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig()
    config.num_labels = 1000
    model = Logits(ResNetForImageClassification(config))
    return Task(model, torch.randn(8, 3, size, size), torch.randint(1000, (8,)))


class Logits(nn.Module):
    """What a loss takes of a model from transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        logits: Tensor = self.model(images).logits
        return logits


def mlp() -> Task:
    """Four layers of width 512 on a batch of 64."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return Task(nn.Sequential(*layers[:-1]), torch.randn(64, 512), torch.randint(512, (64,)))


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over the last dimension."""
    return nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten())
