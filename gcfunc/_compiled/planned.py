"""Steps in place: planned once for the tensors that come, and then called again and again.

Three caches lie behind one another, from the cheapest to ask to the dearest to fill.

1. The latest plan, for the very same tensors. :meth:`Plan.serves` compares identities, addresses,
   shapes and which gradients are missing. Another model, or a parameter that was moved, needs a
   new plan: checks, groups, ``where``, views.
2. Graphs by the key of a substep, which holds shapes, strides, dtypes and projections and none of
   the tensors. A plan compiles only what none has compiled before. Several ``Planned`` may share
   them, as the parameter groups of one ``torch.optim.Optimizer`` do.
3. Within a graph, code for each layout of the gradients, which Dynamo's guards tell apart.

The last two are bounded: see :class:`gcfunc._compiled.graph.Graphs`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from gcfunc._centralization.formula import Units
from gcfunc._compiled.eager import step_eagerly
from gcfunc._compiled.graph import Graph, Graphs, compiles_ahead, is_captured, takes_rows
from gcfunc._compiled.plan import Plan
from gcfunc._compiled.substep import SubStep
from gcfunc._rows import fit
from gcfunc._step.bucket import Bucket
from gcfunc._step.optimizer import Optimizer
from gcfunc._step.state import State
from gcfunc._tensors.check import require_tensors
from gcfunc._tensors.trees import FlatTree

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class _UncompiledError(Exception):
    """There is no compiled graph for a step, and may be none."""


class Planned:
    """An optimizer's steps in place, on trees that were taken apart.

    Args:
        opt: The optimizer.
        kwargs: What :func:`torch.compile` is called with.
        graphs: Compiled graphs to share with others of the same optimizer.
        units: As in :meth:`Optimizer.buckets`, for whoever steps the same leaves ever again.
    """

    _together = False
    """Whether the row kernel is called in the graph that makes the gradients."""

    def __init__(
        self,
        opt: Optimizer,
        kwargs: dict[str, Any],
        graphs: Graphs | None = None,
        units: Sequence[Units | None] | None = None,
    ) -> None:
        self._opt = opt
        self._kwargs = kwargs
        self.graphs = Graphs() if graphs is None else graphs
        self._units = units
        self._serving: tuple[Plan, list[Graph]] | None = None
        self._uncompiled: tuple[Sequence[Tensor], list[bool]] | None = None

    def step(self, flat: FlatTree, gs: Sequence[Tensor | None], state: State) -> None:
        """One step, under :func:`torch.no_grad`."""
        if self._is_uncompiled(flat, gs):
            return step_eagerly(self._opt, self._units, flat, gs, state)
        plan, graphs = self._plan_for(flat, gs, state)
        try:
            self._call(plan, graphs, gs, state)
        except _UncompiledError:
            if len(graphs) < len(plan.substeps):
                # Never to be compiled: no plan is needed to know these again.
                self._uncompiled = flat.leaves, [g is None for g in gs]
            step_eagerly(self._opt, self._units, flat, gs, state)
        except Exception:
            # A trace that failed says so in torch's words; if it was the user's input, in ours.
            self._opt.buckets(flat, gs, state, self._units)
            raise

    def _is_uncompiled(self, flat: FlatTree, gs: Sequence[Tensor | None]) -> bool:
        """Whether these are the latest tensors for which there are too many graphs already."""
        known = self._uncompiled
        return (
            known is not None
            and len(known[0]) == len(flat.leaves)
            and all(map(operator.is_, known[0], flat.leaves))
            and known[1] == [g is None for g in gs]
        )

    def _plan_for(
        self,
        flat: FlatTree,
        gs: Sequence[Tensor | None],
        state: State,
        besides: Mapping[str, Tensor] = NOTHING,
    ) -> tuple[Plan, list[Graph]]:
        """The latest plan and its graphs, or new ones; ``besides`` is written in the same step."""
        serving = self._serving  # read once: another thread may step another model
        written = besides.values() if besides else ()
        if serving is None or not serving[0].serves(flat, gs, state, written):
            require_tensors(flat.names, flat.leaves, "params")
            buckets = self._opt.buckets(flat, gs, state, self._units)
            ahead = self._compiles_ahead(buckets)
            rows = takes_rows(self._kwargs)
            plan = Plan(
                buckets,
                flat,
                gs,
                state,
                split=ahead,
                rows=rows and any(fit.is_for(bucket.device) for bucket in buckets),
                together=self._together,
                besides=written,
            )
            if is_captured(self._kwargs):
                plan.stay_where_they_are(besides.values())
            own = [self._graph_for(substep, flat, besides, ahead) for substep in plan.substeps]
            # There may be too many already, and none for some.
            graphs = [graph for graph in own if graph is not None]
            serving = self._serving = plan, graphs
        return serving

    def _compiles_ahead(self, buckets: Sequence[Bucket]) -> bool:
        return compiles_ahead(self._kwargs, buckets)

    def _graph_for(
        self, substep: SubStep, flat: FlatTree, besides: Mapping[str, Tensor], ahead: bool
    ) -> Graph | None:
        if substep.key not in self.graphs:
            if not self.graphs.may_grow():
                return None
            # Dynamo would take a second model's sizes for the first one's changing.
            kwargs = self._kwargs | {"dynamic": False}
            own = Graph(substep.update(), kwargs, ahead=ahead)
            self.graphs.setdefault(substep.key, own)  # unless another thread was first
        return self.graphs[substep.key]

    def _call(
        self,
        plan: Plan,
        graphs: Sequence[Graph],
        gs: Sequence[Tensor | None],
        state: State,
        *more: Any,
    ) -> list[Any]:
        """Call each substep's graph, with ``more`` after its own arguments, and count."""
        if len(graphs) < len(plan.substeps):
            raise _UncompiledError
        gs, count = plan.gradients(gs), plan.count(state)
        arguments: Sequence[tuple[Any, ...]] = plan.arguments(gs, count, state)
        if more:
            arguments = [(*own, *more) for own in arguments]
        # All are compiled before the first one writes.
        calls = [
            graph.compiled_for(own, again=plan.was_called)
            for graph, own in zip(graphs, arguments, strict=True)
        ]
        if None in calls:
            if not self.graphs.may_grow():
                raise _UncompiledError
            self.graphs.grew()
            calls = [graph.compile_for(own) for graph, own in zip(graphs, arguments, strict=True)]
        launches = [row_step.prepared(gs, state) for row_step in plan.row_steps]
        results = [call(*own) for call, own in zip(calls, arguments, strict=True)]
        for launch in launches:
            launch()
        if count is None:
            state.step.add_(1)
        else:
            state.step.copy_(count)
        plan.was_called = True
        return results
