"""The one pipeline every algorithm is a case of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gcfunc._centralization.kinds import centralize_list
from gcfunc._centralization.where import GC, as_gc
from gcfunc._step.bucket import ListAlgorithm, Projections, Scalars, Slots
from gcfunc._step.hyperparams import Number
from gcfunc._step.optimizer import Optimizer
from gcfunc._tensors.lists import Tensors, add, mul, sub

Direction = Callable[[Tensors, Slots, Scalars], tuple[Tensors, Slots]]
"""What an algorithm makes of a gradient: ``(u, slots, scalars) -> (u, slots)``."""


def pipeline(
    name: str,
    hyperparams: Mapping[str, Number],
    slots: Mapping[str, Callable[[Tensor], Tensor]],
    scalars: Callable[[Tensor, Scalars], dict[str, Tensor]],
    direction: Direction,
    *,
    decoupled: bool,
    gc: GC | str | None,
) -> Optimizer:
    """An optimizer from its direction.

    ``lr`` and ``weight_decay`` are the pipeline's own scalars; ``scalars`` gives those that
    ``direction`` reads, and may override them.
    """
    gc = as_gc(gc)
    at = gc.at if gc else None

    def all_scalars(step: Tensor, h: Scalars) -> dict[str, Tensor]:
        return {"lr": h["lr"], "weight_decay": h["weight_decay"], **scalars(step, h)}

    def update(
        params: Tensors,
        grads: Tensors,
        slots: Slots,
        s: Scalars,
        projections: Projections,
    ) -> tuple[Tensors, Slots]:
        u = grads
        if not decoupled:
            u = add(u, mul(params, s["weight_decay"]))
        if at == "gradient":
            u = centralize_list(u, projections)
        u, slots = direction(u, slots, s)
        if decoupled:
            u = add(u, mul(params, s["weight_decay"]))
        if at == "update":
            u = centralize_list(u, projections)
        return sub(params, mul(u, s["lr"])), slots

    return Optimizer({"": ListAlgorithm(name, hyperparams, slots, all_scalars, update, gc)})


def zeros(param: Tensor) -> Tensor:
    """A slot that starts at zero, laid out like its parameter."""
    return torch.zeros_like(param, requires_grad=False)
