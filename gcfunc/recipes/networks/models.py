"""From a recipe to its network."""

from collections.abc import Callable

import torch
from torch import nn

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.networks.densenet import densenet121
from gcfunc.recipes.networks.initialize import initialize
from gcfunc.recipes.networks.resnet import resnet
from gcfunc.recipes.networks.resnext import resnext29
from gcfunc.recipes.networks.vgg import vgg11
from gcfunc.recipes.recipe import Network, Recipe

WIDTH = 64
"""Of the networks as the reference has them."""

_ARCHITECTURES: dict[str, Callable[[Network, int, int], nn.Module]] = {
    "resnet18": resnet,
    "resnet34": resnet,
    "resnet50": resnet,
    "resnet101": resnet,
    "resnext29": resnext29,
    "vgg11": vgg11,
    "densenet121": densenet121,
}


def build(recipe: Recipe, *, width: int = WIDTH, classes: int | None = None) -> nn.Module:
    """The network of a recipe, initialized, on torch's default device.

    Pretrained weights are for :func:`gcfunc.recipes.networks.weights.load_weights` to bring.

    Args:
        recipe: Whose.
        width: How many channels the first stage has; all others scale with it.
        classes: How many to tell apart, if not as many as the recipe's data has.

    Raises:
        UsageError: A width that is odd or less than 2.
    """
    if width < 2 or width % 2:
        raise UsageError(f"a network's width must be an even number >= 2, got {width}")
    architecture = _ARCHITECTURES[recipe.network.architecture]
    device = torch.get_default_device()
    # Layers that are replaced are never allocated, and nothing is drawn for them.
    with torch.device("meta"):
        model = architecture(
            recipe.network, width, recipe.data.classes if classes is None else classes
        )
    model.to_empty(device=device)
    initialize(model, recipe.network.start)
    return model
