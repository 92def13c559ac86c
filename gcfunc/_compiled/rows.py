"""Which leaves of a step the row kernel takes, and its program for them.

On a GPU, Inductor fuses a mean with the arithmetic around it tensor by tensor only: a launch for
each, and a minute to compile for a model of 161. The row kernel takes all of them in a handful of
launches, and is made of the same :meth:`Bucket.update`, traced on one tensor. What it cannot take
(output units that are no rows, tensors with gaps, rows spread over processes) is Inductor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gcfunc._centralization.formula import ROWS, Projection
from gcfunc._rows import fit
from gcfunc._rows.program import Formula, Program, program_of
from gcfunc._step.bucket import Bucket, ListAlgorithm
from gcfunc._step.state import State
from gcfunc._tensors import sharding
from gcfunc._tensors.lists import Tensors


@lru_cache(maxsize=64)
def _formula(
    algorithm: ListAlgorithm, dtype: torch.dtype, projection: Projection | None
) -> Formula:
    bucket = Bucket("", algorithm, torch.device("cpu"), dtype, [0], [""], [projection])
    names = [*algorithm.hyperparams]

    def update(tensors: Tensors, scalars: Tensors) -> Tensors:
        (p, g, *values), (step, *hyperparams) = tensors, scalars
        slots = {slot: [t] for slot, t in zip(algorithm.slots, values, strict=True)}
        own = bucket.scalars(step + 1, dict(zip(names, hyperparams, strict=True)))
        new, new_slots = bucket.update([p], [g], slots, own)
        return [*new, *(new_slots[slot][0] for slot in slots)]

    return update


def program_for(algorithm: ListAlgorithm, dtype: torch.dtype) -> Program | None:
    """What steps rows with an algorithm; ``None`` if it does what has no spelling in Triton."""
    formula = _formula(algorithm, dtype, None if algorithm.gc is None else ROWS)
    scalars = [torch.int64 if name == "k" else torch.float64 for name in algorithm.hyperparams]
    return program_of(formula, dtype, 2 + len(algorithm.slots), (torch.int64, *scalars))


def split(bucket: Bucket, leaves: Sequence[Tensor], state: State) -> tuple[list[int], list[int]]:
    """Positions of the leaves in a bucket that the row kernel takes, and of all others."""
    every = range(len(bucket.index))
    if not fit.is_for(bucket.device) or program_for(bucket.algorithm, bucket.dtype) is None:
        return [], [*every]
    slots = [
        [sharding.local(state.slots[slot][name]) for name in bucket.names]
        for slot in bucket.algorithm.slots
    ]
    tensors = zip(*(bucket.pick(leaves), *slots), strict=True)
    taken = [takes(p, ts) for p, ts in zip(bucket.projections, tensors, strict=True)]
    return [j for j in every if taken[j]], [j for j in every if not taken[j]]


def takes(projection: Projection | None, tensors: Sequence[Tensor]) -> bool:
    """Whether the row kernel can take a parameter and its slots."""
    if projection is None:
        return fit.without_gaps(tensors)
    if projection.pieces:
        return all(own in (None, ROWS) for _, own in projection.pieces) and fit.in_rows(tensors)
    return projection == ROWS and fit.in_rows(tensors)


def width_of(projection: Projection | None, leaf: Tensor) -> int | None:
    """The length of a leaf's rows, or ``None`` if it is not centralized."""
    return None if projection is None or not leaf.numel() else leaf.numel() // leaf.shape[0]


def laid_out_like(g: Tensor, p: Tensor) -> Tensor:
    """A gradient in the memory layout of its parameter."""
    if g.stride() == p.stride() or fit.order(g) == fit.order(p):
        return g
    return torch.empty_strided(p.size(), p.stride(), dtype=g.dtype, device=g.device).copy_(g)
