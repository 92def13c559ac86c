"""A donated step of the row kernel: launched as it is, without a graph of torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gcfunc._centralization.formula import Projection
from gcfunc._compiled.rows import laid_out_like, program_for, width_of
from gcfunc._rows.launch import Launcher
from gcfunc._rows.layout import Problem
from gcfunc._step.bucket import Bucket
from gcfunc._step.state import State
from gcfunc._tensors import sharding
from gcfunc._tensors.lists import Tensors


class RowStep:
    """Leaves of one bucket that the row kernel steps in place."""

    def __init__(self, bucket: Bucket, leaves: Sequence[Tensor], state: State) -> None:
        program = program_for(bucket.algorithm, bucket.dtype)
        assert program is not None
        self._bucket = bucket
        self._params = bucket.pick(leaves)
        slots = [
            [sharding.local(state.slots[slot][name]) for name in bucket.names]
            for slot in bucket.algorithm.slots
        ]
        self._slots = [t for values in slots for t in values]
        self._like = [_kind(p) for p in self._params]
        problems: list[Problem] = []
        self._places: list[tuple[int, int]] = []
        for i, (projection, p) in enumerate(zip(bucket.projections, self._params, strict=True)):
            offset = 0
            for own, numel, width in _problems(projection, p):
                problems.append(Problem(numel, width if own else None))
                self._places.append((i, offset))
                offset += numel * p.element_size()
        self._is_whole = len(problems) == len(self._params)
        self._written = tuple(self._addresses(tensors) for tensors in (self._params, *slots))
        self.launcher = Launcher(program, problems, bucket.dtype, bucket.device)

    def _addresses(self, tensors: Tensors) -> tuple[int, ...]:
        at = tuple(t.data_ptr() for t in tensors)
        return at if self._is_whole else tuple(at[i] + offset for i, offset in self._places)

    def prepared(self, gs: Sequence[Tensor | None], state: State) -> Callable[[], None]:
        """What updates params and slots from gradients for each leaf; the step is not counted."""
        own = self._bucket.pick(gs)
        if not _PLAIN.issuperset(map(type, own)):
            # One that a process still waits for has no address; copied, it is a plain tensor.
            own = [g if type(g) in _PLAIN else g.clone() for g in own]
        if [_kind(g) for g in own] != self._like:
            own = [_fitting(g, p) for g, p in zip(own, self._params, strict=True)]
        params, *slots = self._written
        columns = (params, self._addresses(own), *slots, params, *slots)
        hyperparams = self._bucket.own(state.hyperparams)
        launch = self.launcher.prepared(columns, [state.step, *hyperparams.values()])
        return partial(self._run, launch, own)

    def _run(self, launch: Callable[[], None], grads: Tensors) -> None:
        """Launch, while the gradients are kept: the kernel knows nothing but addresses."""
        launch()
        # As if torch had written: autograd refuses to go back through what has changed since.
        torch.autograd.graph.increment_version([*self._params, *self._slots])


_PLAIN = frozenset({Tensor, Parameter})


def _kind(t: Tensor) -> tuple[Any, ...]:
    """What a gradient has in common with its parameter."""
    return t.size(), t.stride(), t.dtype, t.device


def _fitting(g: Tensor, p: Tensor) -> Tensor:
    """A gradient in its parameter's layout, or an error, which the caller puts in words."""
    if (g.size(), g.dtype, g.device) != (p.size(), p.dtype, p.device) or type(g) not in _PLAIN:
        raise ValueError("a gradient does not fit its parameter")
    return laid_out_like(g, p)


def _problems(
    projection: Projection | None, p: Tensor
) -> list[tuple[Projection | None, int, int | None]]:
    """Projection, numel and length of rows of each part of a leaf."""
    if projection is None or not projection.pieces:
        return [(projection, p.numel(), width_of(projection, p))]
    width = p.numel() // p.shape[0]
    return [(own, piece.size * width, width) for piece, own in projection.pieces]
