"""The row kernel in a graph of torch.compile: as an operator, in place or pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gcfunc._centralization.formula import Projection
from gcfunc._compiled.rows import (
    laid_out_like,
    program_for,
    takes,
    width_of,
)
from gcfunc._rows import fit, operators  # noqa: F401 - registers them
from gcfunc._rows.program import Program
from gcfunc._step.bucket import Bucket, Scalars, Slots
from gcfunc._step.optimizer import Optimizer, step_bucket, stepped
from gcfunc._step.state import State
from gcfunc._tensors.lists import Tensors, transformed
from gcfunc._tensors.trees import Tree


def update_in_graph(
    program: Program, bucket: Bucket, params: Tensors, grads: Tensors, slots: Slots, given: Scalars
) -> None:
    """The step of leaves that the row kernel takes, in place, as one operator of a graph.

    ``given`` are the step before and the hyperparameters, in the order of the program.
    """
    torch.ops.gcfunc.step_rows_(
        params,
        [t for values in slots.values() for t in values],
        [laid_out_like(g, p) for g, p in zip(grads, params, strict=True)],
        [*given.values()],
        program,
        [
            width_of(projection, p) or 0
            for projection, p in zip(bucket.projections, params, strict=True)
        ],
    )


class PureRows:
    """A pure step for torch.compile to trace, with the row kernel as an operator."""

    def __init__(self, opt: Optimizer, *, possible: bool) -> None:
        self._opt, self._possible = opt, possible
        self._programs: Mapping[Any, Program | None] | None = None

    def prepare(self) -> None:
        """Make the programs, which cannot be done while a step is traced."""
        if self._programs is None and not torch.compiler.is_compiling():
            possible = self._possible and fit.is_anywhere()
            self._programs = {
                (key, dtype): program_for(algorithm, dtype)
                for key, algorithm in self._opt.algorithms.items()
                for dtype in (fit.DTYPES if possible else ())
            }

    def step(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """As :meth:`gcfunc.Optimizer.step`."""
        flat, gs, buckets = self._opt.prepare(params, grads, state)
        new, new_state = stepped(flat, gs, state, buckets, self._update)
        return flat.rebuild(new), new_state

    def _update(
        self,
        bucket: Bucket,
        params: Tensors,
        grads: Tensors,
        slots: Slots,
        state: State,
        count: Tensor,
    ) -> tuple[Tensors, Slots]:
        """The new params and slots."""
        program = (self._programs or {}).get((bucket.key, bucket.dtype))
        hyperparams = bucket.own(state.hyperparams)
        inputs = [*params, *grads, *(t for ts in slots.values() for t in ts), *hyperparams.values()]
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        if program is None or bucket.device.type not in fit.DEVICES or recorded or transformed():
            return step_bucket(bucket, params, grads, slots, state, count)
        names, n = [*slots], len(params)
        rows = list(zip(bucket.projections, params, *slots.values(), strict=True))
        taken = [
            j
            for j, (projection, *ts) in enumerate(rows)
            if not _is_cut(projection) and takes(projection, ts)
        ]
        left = [j for j in range(n) if j not in taken]
        results: list[list[Tensor]] = [[] for _ in range(n)]
        if taken:
            made = torch.ops.gcfunc.step_rows(
                [params[j] for j in taken],
                [values[j] for values in slots.values() for j in taken],
                [laid_out_like(grads[j], params[j]) for j in taken],
                [state.step, *hyperparams.values()],
                program,
                [width_of(bucket.projections[j], params[j]) or 0 for j in taken],
            )
            for i, j in enumerate(taken):
                results[j] = list(made[i :: len(taken)])
        if left:
            others = {name: [slots[name][j] for j in left] for name in names}
            own = bucket.only(left), [params[j] for j in left], [grads[j] for j in left]
            new, new_slots = step_bucket(*own, others, state, count)
            for i, j in enumerate(left):
                results[j] = [new[i], *(new_slots[name][i] for name in names)]
        columns = [list(column) for column in zip(*results, strict=True)]
        return columns[0], dict(zip(names, columns[1:], strict=True))


def _is_cut(projection: Projection | None) -> bool:
    return projection is not None and bool(projection.pieces)
