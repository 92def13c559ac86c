"""What is asked of a parameter group: names, units, gradients, whether it can be stepped."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gcfunc._centralization.formula import Units
from gcfunc._centralization.where import answers_for_some, as_gc
from gcfunc._tensors import trees
from gcfunc._tensors.check import require_tensors
from gcfunc._tensors.modules import flattened_by_fsdp1

Group = dict[str, Any]


def names_of(group: Group) -> dict[Tensor, str]:
    """A name for each parameter: its own if the group has names, else its number."""
    params = group["params"]
    names: Iterable[str] = group.get("param_names", ())
    if len(set(names)) < len(params):
        names = map(str, range(len(params)))  # there are none, or those of two models
    return dict(zip(params, names, strict=True))


def units_of(group: Group) -> dict[str, Units | None]:
    """How each parameter is centralized; none need be."""
    names = names_of(group)
    gc = as_gc(group["gc"])
    if gc is None:
        return dict.fromkeys(names.values())
    given = group.get("param_names", ())
    if len(set(given)) < len(given) and not isinstance(gc.where, str):
        twice = sorted({name for name in given if given.count(name) > 1})
        raise ValueError(f"gc: two parameters have the name {', '.join(map(repr, twice))}")
    masked = not isinstance(gc.where, str) and not trees.is_function(gc.where)
    if masked and "param_names" not in group:
        raise ValueError("gc: a mask needs names; give the optimizer model.named_parameters()")
    return answers_for_some(gc.where, {name: p for p, name in names.items()})


def require_steppable(group: Group) -> None:
    """Raise unless each parameter stands there once and is of a kind that can be stepped."""
    params = group["params"]
    if len(set(params)) < len(params):
        # Torch warns of it for now, and steps them twice.
        raise ValueError("some parameters appear more than once in a parameter group")
    named = {name: p for p, name in names_of(group).items()}
    wrong = flattened_by_fsdp1(named)
    if wrong and group["gc"] is not None:
        raise ValueError(wrong)
    require_tensors([*named], [*named.values()], "params")


def with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have gradients, and these."""
    grads = [p.grad for p in params]
    given = [g for g in grads if g is not None]
    if len(given) < len(params):
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
    return params, given


def require_dense(name: str, grads: Sequence[Tensor]) -> None:
    """Raise for sparse gradients what torch's classes raise."""
    if {g.layout for g in grads} - {torch.strided}:
        raise RuntimeError(f"{name} does not support sparse gradients")
