"""VGG-11 for small images: torchvision's convolutions, and one linear layer."""

from collections import OrderedDict

from torch import nn
from torchvision.models import vgg

from gcfunc.recipes.recipe import Network


def vgg11(network: Network, width: int, classes: int) -> nn.Module:
    """Convolutions with biases and BatchNorm; five poolings leave one pixel of 32x32."""
    plan = [step if step == "M" else step * width // 64 for step in vgg.cfgs["A"]]
    return nn.Sequential(
        OrderedDict(
            features=vgg.make_layers(plan, batch_norm=True),
            avgpool=nn.AdaptiveAvgPool2d(1),  # of larger images
            flatten=nn.Flatten(),
            classifier=nn.Linear(8 * width, classes),
        )
    )
