"""What is asked of a parameter group: names, units, gradients, whether it can be stepped."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gcfunc._centralization.formula import Units
from gcfunc._centralization.where import GC, answers_for_some, as_gc, show_shapes, show_where
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


def require_effect(groups: Sequence[Group]) -> None:
    """Raise ValueError if these look like a whole model of which ``gc`` takes nothing.

    Only a whole model tells that this is a mistake, and an optimizer may hold a part. One parameter
    alone is a part, and so are vectors alone; a mask may select what others hold. In a process
    group it may be a process's share, so that there is a warning only.
    """
    own = [group for group in groups if group["gc"] is not None]
    named = [(name, p) for group in own for p, name in names_of(group).items()]
    if len(named) < 2 or all(p.ndim < 2 for _, p in named) or any(map(_takes_some, own)):
        return
    gc = own[0]["gc"]
    said = f"GC({show_where(gc.where)})" if isinstance(gc, GC) else repr(gc)
    message = f"gc={said} selects none of the parameters ({show_shapes(named)}); gc=None says so"
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        raise ValueError(message)
    warnings.warn(
        f"{message}, and is right where other processes hold what it selects", stacklevel=3
    )


def _takes_some(group: Group) -> bool:
    gc = as_gc(group["gc"])
    if gc is None:
        return False
    if isinstance(gc.where, str) or trees.is_function(gc.where):
        return any(units_of(group).values())
    return any(trees.leaves_of(gc.where))


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
