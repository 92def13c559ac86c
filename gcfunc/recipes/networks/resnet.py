"""ResNets: small images, biases in convolutions, GroupNorm, standardized weights, other widths."""

import math
from functools import partial
from typing import Any

from torch import nn
from torchvision import models

from gcfunc.recipes.networks.standardized import StandardizedConv2d
from gcfunc.recipes.recipe import Network

_GROUPS = 32


def resnet(network: Network, width: int, classes: int) -> nn.Module:
    """torchvision's, with its layers changed; the names of its parameters stay."""
    scaled = partial(_scaled, width)
    kind = StandardizedConv2d if network.standardized else nn.Conv2d
    # Partial, as torchvision keeps it in the model, which must be possible to pickle.
    norm = partial(_norm, network, width)
    model: Any = models.get_model(network.architecture, weights=None, norm_layer=norm)
    if network.stem == "small":
        model.conv1 = nn.Conv2d(3, 64, 3)
        model.maxpool = nn.Identity()
    for name, conv in [*model.named_modules()]:
        if isinstance(conv, nn.Conv2d):
            channels = 3 if name == "conv1" else scaled(conv.in_channels)
            side = conv.kernel_size[0]
            new = kind(
                channels,
                scaled(conv.out_channels),
                side,
                conv.stride[0],
                padding=side // 2,
                bias=network.conv_bias,
            )
            model.set_submodule(name, new)
    model.fc = nn.Linear(scaled(model.fc.in_features), classes)
    return model  # type: ignore[no-any-return]


def _norm(network: Network, width: int, channels: int) -> nn.Module:
    if network.norm == "batch":
        return nn.BatchNorm2d(_scaled(width, channels))
    # Narrow networks have fewer groups: 2 channels in each of the stem's, as at full width.
    return nn.GroupNorm(math.gcd(_GROUPS, width // 2), _scaled(width, channels))


def _scaled(width: int, channels: int) -> int:
    return channels * width // 64
