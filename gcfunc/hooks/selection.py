"""Which parameters of a model are centralized by hooks, and which already are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from gcfunc._centralization.formula import Units
from gcfunc._centralization.where import Where, answers, require_some
from gcfunc._tensors import trees
from gcfunc._tensors.check import FLOATS, require_tensors
from gcfunc._tensors.modules import flattened_by_fsdp1, require_module, require_shape
from gcfunc._tensors.sharding import is_dtensor

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.fsdp import FSDPModule


class Selected(NamedTuple):
    """A parameter to centralize."""

    name: str
    param: Tensor
    units: Units


class HookRecord:
    """A parameter that is centralized by a hook, for as long as the hook lives.

    The parameter is known by its id. A weak reference to it would keep ``model.to(dtype)`` from
    converting DTensors, which torch does by swapping tensors. The hook lives as long as the
    parameter, or as the DDP that it was registered with.

    Some hooks are kept by the Python object (``in_python``), the others by the C++ object beneath,
    at ``_cdata``. Swapping tensors replaces the latter. The attribute is private; torch has no
    public one that tells.
    """

    def __init__(
        self, name: str, param: Tensor, hook: Callable[..., Any], *, in_python: bool
    ) -> None:
        self.name = name
        self.param = id(param)
        self._address = None if in_python else param._cdata
        active.add(self)
        weakref.finalize(hook, active.discard, self).atexit = False

    def is_on(self, param: Tensor | None) -> bool:
        """Whether the hook still is where the gradients of ``param``, of that id, arrive."""
        return param is not None and self in active and self._address in (None, param._cdata)


active: set[HookRecord] = set()
"""Of all hooks that live."""


def select_parameters(model: nn.Module, where: Where) -> list[Selected]:
    """The parameters to centralize, or the error that says why they cannot be."""
    require_module(model)
    reshard(model)
    named = dict(model.named_parameters())
    if wrong := flattened_by_fsdp1(named):
        raise TypeError(wrong)
    # Private, as nothing public tells what DDP made of a DTensor.
    if cut := [name for name, p in named.items() if hasattr(p, "_st_info")]:
        raise TypeError(
            f"{', '.join(map(repr, cut))}: DDP over tensor parallel keeps each process's part of a "
            "weight and nothing of its rows; use FSDP2 (fully_shard) over tensor parallel"
        )
    for name, p in named.items():
        require_shape(p, f"model: {name!r}")
    # Quantized weights, say, are frozen for good.
    trainable = [
        i
        for i, p in enumerate(named.values())
        if p.requires_grad or (p.dtype in FLOATS and not p.is_inference())
    ]
    flat = trees.flatten(named, "model")
    units = answers(where, flat.names, flat.leaves, trainable)
    require_some(where, units, flat, trainable)
    chosen = {flat.names[i]: own for i, own in zip(trainable, units, strict=True) if own}
    require_tensors([*chosen], [named[name] for name in chosen], "model")
    present = {id(param): param for param in named.values()}
    # Copied, as garbage collection may take from it at any time.
    taken = {c.param for c in [*active] if c.is_on(present.get(c.param))}
    if twice := [name for name in chosen if id(named[name]) in taken]:
        raise ValueError(
            f"{', '.join(map(repr, twice))}: already centralized by hooks registered before; "
            "remove() their handle first, or drop the DDP that register_ddp was called with"
        )
    return [Selected(name, named[name], own) for name, own in chosen.items()]


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its sharded parameters, which bear the hooks, back into the model."""
    if dist.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def managed_by_fsdp2(model: nn.Module, selected: Iterable[Selected]) -> set[Tensor]:
    """Those that only FSDP2 sees the gradients of, or the error that there are others."""
    if not dist.is_available():
        return set()
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    within = {p for module in modules for p in module.parameters()}
    outside = [s.name for s in selected if s.param.requires_grad and s.param not in within]
    if modules and outside:
        raise ValueError(
            f"{', '.join(map(repr, outside))}: not in a module that fully_shard was applied to, "
            "while others are. Register after the last fully_shard, which would leave the hooks "
            "behind; or, if they are to stay as they are, leave them out by where and give "
            "centralize_backward their own module"
        )
    return {p for p in within if is_dtensor(p)}


def refuse_sparse(model: nn.Module, params: Iterable[Tensor | None], way_out: str) -> None:
    """Raise ValueError if one of the parameters is known to get sparse gradients."""
    of_interest = {*params}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and module.sparse
            and module.weight.requires_grad
            and module.weight in of_interest
        ):
            raise ValueError(
                f"{name or type(module).__name__!r} has sparse=True, and its weight's gradient "
                f"will be sparse; {way_out}"
            )
