"""A batch cut into micro-batches, and what is made of theirs: clipped gradients, gathered aux."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gcfunc._tensors import trees
from gcfunc._tensors.lists import Tensors
from gcfunc._tensors.trees import Tree


def micro_batches(inputs: Any, targets: Any, n: int) -> list[tuple[Any, Any]]:
    """The micro-batches of a batch."""
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    if n == 1:
        return [(inputs, targets)]
    flat = trees.flatten({"inputs": inputs, "targets": targets}, "the batch")
    columns = [_cut(name, leaf, n) for name, leaf in zip(flat.names, flat.leaves, strict=True)]
    batches = [flat.rebuild(list(row)) for row in zip(*columns, strict=True)]
    return [(batch["inputs"], batch["targets"]) for batch in batches]


def _cut(name: str, leaf: Any, n: int) -> list[Any]:
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return [leaf] * n
    if not isinstance(leaf, Tensor):
        raise TypeError(f"accumulate={n} cannot cut up {name!r} of type {type(leaf).__name__}")
    if not leaf.ndim:
        raise ValueError(f"accumulate={n} cannot cut up {name!r}, a 0-d tensor")
    size = leaf.shape[0]
    if size == 0 or size % n:
        raise ValueError(f"accumulate={n} does not divide {name!r} with dimension 0 of size {size}")
    return list(leaf.chunk(n))


def clip(gs: Tensors, max_norm: float) -> Tensors:
    """As :func:`torch.nn.utils.clip_grad_norm_`, out of place."""
    norms = [torch.linalg.vector_norm(g) for g in gs]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    return [g * factor.to(g.device, g.dtype) for g in gs]


def gather(auxes: list[Tree]) -> Tree:
    """One aux of all micro-batches, which shares memory with nothing."""
    if len(auxes) == 1:
        return trees.mapped(torch.clone, auxes[0])
    return trees.mapped(lambda *each: torch.stack(each), *auxes)
