"""How the networks of the recipes are initialized."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn import init

from gcfunc.recipes.recipe import Start


def initialize(model: nn.Module, start: Start) -> None:
    """Draw every parameter, and reset every buffer, from torch's generator.

    A module that holds tensors and cannot reset them raises an ``AttributeError``: the tensors of
    a model that is being built are not written yet.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.reset_parameters()
    if start == "torch":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # Of biases the reference leaves what torch drew.
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d) and start == "fan-out, norms uniform":
            init.uniform_(module.weight)
