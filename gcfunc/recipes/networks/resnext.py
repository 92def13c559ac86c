"""ResNeXt-29, 4x64d, which torchvision lacks: three stages of its bottlenecks."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn
from torchvision.models.resnet import Bottleneck

from gcfunc.recipes.recipe import Network

_CARDINALITY, _BLOCKS, _STAGES = 4, 3, 3


def resnext29(network: Network, width: int, classes: int) -> nn.Module:
    """Groups of ``width`` channels in the first stage, and twice as many in each next one."""
    # What a stage gives is twice as wide as all groups of its 3x3 convolutions together.
    outputs = [2 * _CARDINALITY * width * 2**stage for stage in range(_STAGES)]
    stages = {
        f"layer{stage}": _stage(before, after, stride=1 if stage == 1 else 2)
        for stage, (before, after) in enumerate(pairwise([width, *outputs]), 1)
    }
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, width, 1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            **stages,
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(outputs[-1], classes),
        )
    )


def _stage(before: int, after: int, stride: int) -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
    # torchvision counts widths for blocks that widen 4 times. With a base of 32 for 64 they widen
    # twice, groups included.
    planes = after // Bottleneck.expansion
    shape = {"groups": _CARDINALITY, "base_width": 128 // _CARDINALITY}
    first = Bottleneck(before, planes, stride, shortcut, **shape)
    return nn.Sequential(first, *(Bottleneck(after, planes, **shape) for _ in range(1, _BLOCKS)))
