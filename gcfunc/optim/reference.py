"""The classes under the reference's names, with its defaults and results."""

from typing import Any

from torch import Tensor

from gcfunc._centralization.where import GC
from gcfunc.optim.classes import SGD, SGDW, Adagrad, Adam, AdamW
from gcfunc.optim.groups import Group


class _AdamWOfTheReference(AdamW):
    """Its decay and eps are scaled by the bias corrections, and it does not decay by default."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **kwargs)

    def _hyperparam(self, group: Group, name: str, step: int) -> Any:
        value = super()._hyperparam(group, name, step)
        beta1, beta2 = group["betas"]
        if name == "eps":
            return value / (1 - beta2**step) ** 0.5
        if name == "weight_decay":
            return value * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return value


class SGD_GC(SGD):
    """The reference's ``SGD_GC``: all weights are centralized."""

    _gc = "gc"


class SGD_GCC(SGD):
    """The reference's ``SGD_GCC``: convolution weights are centralized."""

    _gc = "gcc"


class SGDW_GC(SGDW):
    """The reference's ``SGDW_GC``: all weights are centralized."""

    _gc = "gc"


class SGDW_GCC(SGDW):
    """The reference's ``SGDW_GCC``: convolution weights are centralized."""

    _gc = "gcc"


class Adam_GC(Adam):
    """The reference's ``Adam_GC``: all weights are centralized."""

    _gc = "gc"


class Adam_GCC(Adam):
    """The reference's ``Adam_GCC``: convolution weights are centralized."""

    _gc = "gcc"


class Adam_GC2(Adam):
    """The reference's ``Adam_GC2``: all weights are centralized at the update."""

    _gc = GC("gc", at="update")


class Adam_GCC2(Adam):
    """The reference's ``Adam_GCC2``: convolution weights are centralized at the update."""

    _gc = GC("gcc", at="update")


class AdamW_GC(_AdamWOfTheReference):
    """The reference's ``AdamW_GC``: all weights are centralized."""

    _gc = "gc"


class AdamW_GCC(_AdamWOfTheReference):
    """The reference's ``AdamW_GCC``: convolution weights are centralized."""

    _gc = "gcc"


class AdamW_GC2(_AdamWOfTheReference):
    """The reference's ``AdamW_GC2``: all weights are centralized at the update."""

    _gc = GC("gc", at="update")


class AdamW_GCC2(_AdamWOfTheReference):
    """The reference's ``AdamW_GCC2``: convolution weights are centralized at the update."""

    _gc = GC("gcc", at="update")


class Adagrad_GC(Adagrad):
    """The reference's ``Adagrad_GC``: all weights are centralized."""

    _gc = "gc"


class Adagrad_GCC(Adagrad):
    """The reference's ``Adagrad_GCC``: convolution weights are centralized."""

    _gc = "gcc"
