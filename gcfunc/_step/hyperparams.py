"""Hyperparameters: their bounds, how a number becomes a 0-d tensor of the state, and changes."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gcfunc._step.state import State, require_state
from gcfunc._tensors.lists import under_vmap

Number = float | Tensor
"""A Python number or a 0-d tensor."""

_NON_NEGATIVE = ("a finite number >= 0", lambda x: 0 <= x < math.inf)
_FRACTION = ("in [0, 1)", lambda x: 0 <= x < 1)
_UP_TO_ONE = ("in [0, 1]", lambda x: 0 <= x <= 1)
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
    "alpha": _UP_TO_ONE,
    "lookahead_alpha": _UP_TO_ONE,
}


def check(**values: Number) -> dict[str, Number]:
    """The values as Python numbers or 0-d tensors, once each is found within its bounds.

    A tensor's value is not read where that would wait for a device, leave a compiled graph or
    break a vmap.
    """
    return {name: _check(name, value) for name, value in values.items()}


def _check(name: str, value: Any) -> Number:
    if name not in BOUNDS:
        raise LookupError(f"hyperparameter {name!r} has no bounds yet; give it a line in BOUNDS")
    text, within = BOUNDS[name]
    value = of_numpy(value)
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


def of_numpy(value: Any) -> Any:
    """The Python number in a 0-d array or a NumPy number, anything else as it is.

    An array can be written in place, so that whoever keeps it sees no change.
    """
    is_numpys = not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0
    return value.item() if is_numpys else value


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


def update_hyperparams(state: State, **values: Any) -> State:
    """The same state with other hyperparameters; a compiled step does not recompile.

    ``step`` and ``slots`` are shared with the state given, so that of the two only one may be
    handed to a donated step.

    Args:
        state: A state; it is not changed.
        values: New values by the names in ``state.hyperparams``, numbers or 0-d tensors;
            ``betas=(0.9, 0.99)`` sets ``beta1`` and ``beta2``. In a state of
            :func:`gcfunc.partition`, ``lr=0.1`` sets every group's and ``**{"head.lr": 0.1}``
            that of one.

    Raises:
        ValueError: the state has no such hyperparameter, or the value is out of its bounds.
        TypeError: the value is neither a number nor a real 0-d tensor, or ``state`` is no state.

    Example:
        >>> import torch, gcfunc
        >>> state = gcfunc.sgd(lr=0.1).init({"w": torch.ones(2)})
        >>> float(gcfunc.update_hyperparams(state, lr=0.05).hyperparams["lr"])
        0.05
    """
    require_state(state)
    hyperparams = dict(state.hyperparams)
    for qualified, value in values.items():
        prefix, dot, name = qualified.rpartition(".")
        for single in ("beta1", "beta2") if name == "betas" else (name,):
            ending = prefix + dot + single
            alone = dot and ending in hyperparams
            keys = [ending] if alone else [k for k in hyperparams if f".{k}".endswith(f".{ending}")]
            if not keys:
                hint = "; momentum needs a buffer: build the optimizer with it, or with a tensor"
                raise ValueError(
                    f"the state has no hyperparameter {ending!r}, it has {', '.join(hyperparams)}"
                    + (hint if single in ("momentum", "dampening") else "")
                )
            new = check_betas(value) if name == "betas" else check(**{name: value})
            for key in keys:
                hyperparams[key] = to_scalars({single: new[single]}, hyperparams[key].device)[
                    single
                ]
    return state._replace(hyperparams=hyperparams)
