"""What one compiled graph does of a step: its inputs, and the function that is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gcfunc._centralization.formula import Projection
from gcfunc._compiled.row_graph import update_in_graph
from gcfunc._compiled.views import BACK, View, as_it_is, view_for, viewed
from gcfunc._rows import fit
from gcfunc._rows.launch import near
from gcfunc._rows.program import Program
from gcfunc._step.bucket import Bucket, Scalars, Slots
from gcfunc._step.state import State
from gcfunc._tensors import sharding
from gcfunc._tensors.lists import Tensors
from gcfunc._tensors.packed import cut

Arguments = tuple[list[Tensors], list[Tensors], list[Slots], list[Scalars]]
Update = Callable[[list[Tensors], list[Tensors], list[Slots], list[Scalars]], None]
"""An update in place: ``(params, grads, slots, scalars)``, each a list with an item a bucket."""
Differentiate = Callable[..., tuple[dict[str, Tensor], Any]]
"""``(leaves by name, ...) -> (their gradients by name, anything)``."""


class SubStep:
    """Leaves that one graph steps, of one or more buckets.

    Tensors are handed to the graph in views, and packed ones whose pieces differ in their
    projections piece by piece. Substeps that are equal in :attr:`key` can share a graph.
    """

    def __init__(
        self,
        buckets: list[tuple[int, Bucket]],
        leaves: Sequence[Tensor],
        state: State,
        programs: Sequence[Program | None] | None = None,
    ) -> None:
        self._from = [i for i, _ in buckets]
        self._programs = [None] * len(buckets) if programs is None else [*programs]
        self._params: list[Tensors] = []
        self._slots: list[Slots] = []
        self._buckets: list[Bucket] = []
        self._whole: list[list[Projection | None]] = []
        self._views: list[list[View]] = []
        for (_, bucket), program in zip(buckets, self._programs, strict=True):
            whole = bucket.projections
            ps = _cut(bucket.pick(leaves), whole)
            slots = {
                slot: _cut([sharding.local(state.slots[slot][n]) for n in bucket.names], whole)
                for slot in bucket.algorithm.slots
            }
            own = [one for projection in whole for one in _each(projection)]
            views = [
                as_it_is if program else view_for(projection, [p, *others])
                for projection, p, *others in zip(own, ps, *slots.values(), strict=True)
            ]
            turned = [
                viewed(projection, view, p.ndim)
                for projection, view, p in zip(own, views, ps, strict=True)
            ]
            self._params.append([view(p) for p, view in zip(ps, views, strict=True)])
            self._slots.append(
                {
                    slot: [view(t) for t, view in zip(values, views, strict=True)]
                    for slot, values in slots.items()
                }
            )
            self._buckets.append(replace(bucket, projections=turned))
            self._whole.append(whole)
            self._views.append(views)
        self.key = tuple(
            (
                bucket.key,
                bucket.device,
                bucket.dtype,
                program is not None,
                *whole,
                *views,
                *((p.shape, p.stride()) for p in ps),
                *(t.stride() for values in slots.values() for t in values),
            )
            for bucket, program, whole, views, ps, slots in zip(
                self._buckets,
                self._programs,
                self._whole,
                self._views,
                self._params,
                self._slots,
                strict=True,
            )
        )

    def arguments(self, gs: Sequence[Tensor | None], scalars: Sequence[Scalars]) -> Arguments:
        """What to call the compiled function with: gradients for each leaf, scalars a bucket.

        The latter are :func:`scalars_for` each.
        """
        return (
            self._params,
            [bucket.pick(gs) for bucket in self._buckets],
            self._slots,
            [scalars[i] for i in self._from],
        )

    def written(self) -> Tensors:
        """What the graph is handed to write over."""
        slots = [t for own in self._slots for values in own.values() for t in values]
        return [t for ps in self._params for t in ps] + slots

    def update(self) -> Update:
        """The function to compile. It holds on to none of the tensors."""
        buckets, whole, views = self._buckets, self._whole, self._views
        programs = self._programs
        outside = [computed_outside(bucket.device) for bucket in buckets]

        def update(
            params: list[Tensors], grads: list[Tensors], slots: list[Slots], scalars: list[Scalars]
        ) -> None:
            for i, bucket in enumerate(buckets):
                gs = _cut(grads[i], whole[i])
                gs = [view(g) for g, view in zip(gs, views[i], strict=True)]
                for g, p in zip(gs, params[i], strict=True):
                    # While it is traced only: another shape might broadcast.
                    if g.shape != p.shape or g.dtype != p.dtype:
                        raise ValueError("a gradient does not fit its parameter")
                program = programs[i]
                if program is not None:
                    update_in_graph(program, bucket, params[i], gs, slots[i], scalars[i])
                    continue
                made = scalars[i] if outside[i] else scalars_in(bucket, scalars[i])
                new, new_slots = bucket.update(params[i], gs, slots[i], made)
                _write(params[i], new)
                for slot, values in new_slots.items():
                    _write(slots[i][slot], values)

        return update

    def update_after(self, differentiate: Differentiate) -> Callable[..., Any]:
        """The function to compile where the gradients are made in the same graph.

        It is called like :meth:`update`, without gradients, and then with what ``differentiate``
        takes besides the leaves by name; it returns what that returns besides their gradients.
        """
        update, views = self.update(), self._views
        names = [bucket.names for bucket in self._buckets]

        def step(
            params: list[Tensors],
            _: list[Tensors],
            slots: list[Slots],
            scalars: list[Scalars],
            *given: Any,
        ) -> Any:
            leaves = {
                name: BACK[view](p)
                for row in zip(names, views, params, strict=True)
                for name, view, p in zip(*row, strict=True)
            }
            grads, results = differentiate(leaves, *given)
            update(params, [[grads[name] for name in own] for own in names], slots, scalars)
            return results

        return step


def computed_outside(device: torch.device) -> bool:
    """Whether scalars are made before a graph is called, or in it, where they are used.

    On the CPU, Inductor would inline them, powers and all, into its loops. On a GPU each operation
    outside would be a launch.
    """
    return device.type == "cpu" and not fit.is_for(device)


def scalars_for(bucket: Bucket, count: Tensor | None, state: State) -> Scalars:
    """What a graph is given of the step's scalars, or of what it makes them of."""
    own = bucket.own(state.hyperparams)
    if count is not None and computed_outside(bucket.device):
        return bucket.scalars(count, own)
    return dict(zip(("", *own), near([state.step, *own.values()], bucket.device), strict=True))


def scalars_in(bucket: Bucket, given: Scalars) -> Scalars:
    """The scalars, from what :func:`scalars_for` gave."""
    own = dict(given)
    return bucket.scalars(own.pop("") + 1, own)


def _cut(tensors: Tensors, projections: Sequence[Projection | None]) -> Tensors:
    """The tensors, those cut up that are packed and whose pieces differ in their projections."""
    return [
        one
        for t, projection in zip(tensors, projections, strict=True)
        for one in (
            cut(t, [piece for piece, _ in projection.pieces])
            if projection and projection.pieces
            else [t]
        )
    ]


def _each(projection: Projection | None) -> list[Projection | None]:
    """The projections of what :func:`_cut` makes of a tensor."""
    return (
        [own for _, own in projection.pieces] if projection and projection.pieces else [projection]
    )


def _write(old: Tensors, new: Tensors) -> None:
    for o, n in zip(old, new, strict=True):
        o.copy_(n)
