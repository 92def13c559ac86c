"""DenseNet-121 for small images: torchvision's, with one convolution for its stem."""

from typing import Any

from torch import nn
from torchvision import models

from gcfunc.recipes.recipe import Network


def densenet121(network: Network, width: int, classes: int) -> nn.Module:
    """Growth is half of what the stem gives. The stem has neither norm nor pooling."""
    model: Any = models.DenseNet(
        growth_rate=width // 2, num_init_features=width, num_classes=classes
    )
    model.features.conv0 = nn.Conv2d(3, width, 3, padding=1, bias=False)
    for rest in ("norm0", "relu0", "pool0"):
        delattr(model.features, rest)
    return model  # type: ignore[no-any-return]
