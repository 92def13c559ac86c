"""Hyperparameters: their bounds, and how a number becomes a 0-d tensor of the state."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gcfunc._foreach import under_vmap

Number = float | Tensor
"""A Python number or a 0-d tensor."""

_NON_NEGATIVE = ("a finite number >= 0", lambda x: 0 <= x < math.inf)
_FRACTION = ("in [0, 1)", lambda x: 0 <= x < 1)
BOUNDS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": _NON_NEGATIVE,
    "momentum": _NON_NEGATIVE,
    "dampening": ("a finite number", math.isfinite),
    "weight_decay": _NON_NEGATIVE,
    "eps": _NON_NEGATIVE,
    "beta1": _FRACTION,
    "beta2": _FRACTION,
    "lr_decay": _NON_NEGATIVE,
    "initial_accumulator_value": _NON_NEGATIVE,
    "k": ("an integer from 1 to 2**31", lambda x: 1 <= x <= 2**31 and x == int(x)),
    "alpha": ("in [0, 1]", lambda x: 0 <= x <= 1),
}


def check(**values: Number) -> dict[str, Number]:
    """The values as Python numbers or 0-d tensors, once each is found within its bounds.

    A tensor's value is not read where that would wait for a device, leave a compiled graph or
    break a vmap.
    """
    return {name: _check(name, value) for name, value in values.items()}


def _check(name: str, value: Any) -> Number:
    text, within = BOUNDS[name]
    if isinstance(value, Tensor):
        if value.ndim or value.dtype is torch.bool or value.is_complex():
            raise TypeError(
                f"{name} must be a real 0-d tensor or a number, got a tensor of shape "
                f"{tuple(value.shape)} and dtype {value.dtype}"
            )
        if torch.compiler.is_compiling() or under_vmap() or value.device.type != "cpu":
            return value
        number = value.item()
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    else:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if math.isnan(number) or not within(number):
        raise ValueError(f"{name} must be {text}, got {value}")
    if isinstance(value, Tensor):
        return value
    return int(number) if name == "k" else number


def check_betas(betas: Any) -> dict[str, Number]:
    """Adam's pair of decay rates, under the names they have in the state."""
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}") from None
    return check(beta1=beta1, beta2=beta2)


def is_zero(value: Number) -> bool:
    """Whether the hyperparameter is the Python number 0, which it then stays."""
    return not isinstance(value, Tensor) and value == 0


def to_scalars(values: Mapping[str, Number], device: torch.device) -> dict[str, Tensor]:
    """0-d tensors of their own storage: int64 for counts, float64 for everything else."""
    # MPS has no float64.
    floating = torch.float32 if device.type == "mps" else torch.float64
    return {
        name: _fresh(value, torch.int64 if name == "k" else floating, device)
        for name, value in values.items()
    }


def _fresh(value: Number, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, dtype, copy=True)
    return torch.full((), value, dtype=dtype, device=device)
