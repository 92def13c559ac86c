"""A small convolutional network."""

import torch
from torch import Tensor, nn

from gcfunc.recipes.errors import UsageError

Params = dict[str, Tensor]


def build(height: int, width: int, classes: int) -> nn.Module:
    """Two convolutions and two linear layers; normalized by group, so without buffers."""
    if min(height, width) < 4:
        raise UsageError(f"images of {height}x{width} are too small: two poolings need 4x4")
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def initial_params(model: nn.Module, seed: int) -> Params:
    """Fresh parameters for ``model``, drawn from ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
                module.reset_parameters()
    return {name: p.detach().clone() for name, p in model.named_parameters()}
