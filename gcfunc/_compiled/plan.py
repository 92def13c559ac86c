"""What a donated step does to given tensors: which views of them go into which compiled graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gcfunc._compiled import repeats
from gcfunc._compiled.row_step import RowStep
from gcfunc._compiled.rows import program_for
from gcfunc._compiled.rows import split as row_positions
from gcfunc._compiled.substep import Arguments, SubStep, computed_outside, scalars_for
from gcfunc._step.bucket import Bucket
from gcfunc._step.state import State, slot_tensors
from gcfunc._tensors import sharding
from gcfunc._tensors.check import require_like
from gcfunc._tensors.lists import Tensors
from gcfunc._tensors.trees import FlatTree


class Plan:
    """What stays the same as long as the same tensors are stepped.

    ``besides`` are tensors that are written in the same step. With ``split``, many substeps instead
    of one. With ``rows``, the row kernel takes the leaves that it can: in a step of their own, or
    with ``together`` in the graph of all others.
    """

    was_called = False
    """Whether a step of this plan has ended."""

    def __init__(
        self,
        buckets: list[Bucket],
        flat: FlatTree,
        gs: Sequence[Tensor | None],
        state: State,
        *,
        split: bool,
        rows: bool,
        together: bool = False,
        besides: Iterable[Tensor] = (),
    ) -> None:
        self._names = flat.names
        self._tensors = flat.leaves + slot_tensors(state) + [*besides]
        self._dtensors = flat.leaves if sharding.any_dtensors(flat.leaves) else None
        tensors, leaves = self._local(self._tensors), self._local(flat.leaves)
        self._places = _places(leaves, tensors)
        self._without = [i for i, g in enumerate(gs) if g is None]
        _require_own_memory(tensors)
        self._written = {t.data_ptr() for t in tensors if t.numel()}
        self._storages = {_storage(t) for t in tensors if t.numel()}
        self._buckets = buckets
        self.row_steps: list[RowStep] = []
        if rows:
            taken, left = _shared_out(buckets, leaves, state)
            if together:
                programs = [program_for(b.algorithm, b.dtype) for _, b in taken]
                programs += [None] * len(left)
                self.substeps = [SubStep([*taken, *left], leaves, state, programs)]
            else:
                self.row_steps = [RowStep(bucket, leaves, state) for _, bucket in taken]
                self.substeps = [SubStep(left, leaves, state)] if left else []
        else:
            one = [[(i, range(len(bucket.index))) for i, bucket in enumerate(buckets)]]
            self.substeps = [
                SubStep([(i, buckets[i].only(members)) for i, members in own], leaves, state)
                for own in (repeats.split(buckets, leaves) if split else one)
            ]

    def stay_where_they_are(self, besides: Iterable[Tensor]) -> None:
        """Say that what is written is never moved: Inductor makes no CUDA graph otherwise."""
        for t in (*(t for substep in self.substeps for t in substep.written()), *besides):
            torch._dynamo.mark_static_address(t)

    def _local(self, tensors: Tensors) -> Tensors:
        return tensors if self._dtensors is None else [sharding.local(t) for t in tensors]

    def serves(
        self,
        flat: FlatTree,
        gs: Sequence[Tensor | None],
        state: State,
        besides: Iterable[Tensor] = (),
    ) -> bool:
        """Whether the same tensors came again."""
        tensors = flat.leaves + slot_tensors(state) + [*besides]
        return (
            flat.names == self._names
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and _places(self._local(flat.leaves), self._local(tensors)) == self._places
            and [i for i, g in enumerate(gs) if g is None] == self._without
        )

    def gradients(self, gs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients as they are stepped with: shards, and none of them in what is written."""
        if self._dtensors is not None:
            gs = [
                g if g is None else _local_gradient(name, g, p)
                for name, g, p in zip(self._names, gs, self._dtensors, strict=True)
            ]
        given = [g for g in gs if g is not None]
        if any(map(Tensor.is_neg, given)):
            gs = [g if g is None else g.resolve_neg() for g in gs]
            given = [g for g in gs if g is not None]
        if any(map(Tensor._is_view, given)) or not self._written.isdisjoint(
            map(Tensor.data_ptr, given)
        ):
            # A gradient may be, or be a view into, a tensor that is written before it is read.
            gs = [g.clone() if g is not None and _storage(g) in self._storages else g for g in gs]
        return gs

    def count(self, state: State) -> Tensor | None:
        """The count of this step, where scalars are made of it before a graph is called."""
        outside = any(computed_outside(bucket.device) for bucket in self._buckets)
        return state.step + 1 if outside else None

    def arguments(
        self, gs: Sequence[Tensor | None], count: Tensor | None, state: State
    ) -> list[Arguments]:
        """What to call each substep's compiled function with."""
        if not self.substeps:
            return []
        scalars = [scalars_for(bucket, count, state) for bucket in self._buckets]
        return [substep.arguments(gs, scalars) for substep in self.substeps]


def _shared_out(
    buckets: Sequence[Bucket], leaves: Tensors, state: State
) -> tuple[list[tuple[int, Bucket]], list[tuple[int, Bucket]]]:
    """What the row kernel takes of each bucket, and what it does not."""
    taken: list[tuple[int, Bucket]] = []
    left: list[tuple[int, Bucket]] = []
    for i, bucket in enumerate(buckets):
        for positions, into in zip(
            row_positions(bucket, leaves, state), (taken, left), strict=True
        ):
            if positions:
                into.append((i, bucket.only(positions)))
    return taken, left


def _local_gradient(name: str, g: Tensor, param: Tensor) -> Tensor:
    require_like("grads", name, g, param)
    return sharding.local_like(g, param)


def _places(params: Tensors, tensors: Tensors) -> tuple[list[Any], ...]:
    """Where tensors lie: ``tensor.data = other`` keeps the object and moves it."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.size, params)),
        list(map(Tensor.stride, params)),
    )


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _require_own_memory(tensors: Tensors) -> None:
    """Raise unless the tensors can be written one after the other without touching another."""
    spans: list[tuple[int, int]] = []
    for t in tensors:
        if t.numel() == 0:
            continue
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        if extent < t.numel():
            raise ValueError(
                f"a tensor of shape {tuple(t.shape)} and strides {t.stride()} overlaps itself (it "
                "is expanded?) and cannot be updated in place; clone it, or use donate=False"
            )
        spans.append((t.data_ptr(), t.data_ptr() + extent * t.element_size()))
    spans.sort()
    for (_, end), (start, _) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                "the address ranges of two tensors of params and state overlap, so that they may "
                "share memory and cannot be updated in place; list tied weights once, clone what "
                "is shared or interleaved, or use donate=False"
            )
