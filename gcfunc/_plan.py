"""What a donated step does to given tensors: which views of them go into which compiled graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from torch import Tensor

from gcfunc import _sharding, _tree
from gcfunc._check import require_like
from gcfunc._foreach import Tensors
from gcfunc._optimizer import Bucket
from gcfunc._packed import cut
from gcfunc._types import Scalars, Slots, State
from gcfunc.centralize import ROWS, Sharded, Stack, Unit, Units

Arguments = tuple[list[Tensors], list[Tensors], list[Slots], list[Scalars]]
Update = Callable[[list[Tensors], list[Tensors], list[Slots], list[Scalars]], None]
"""An update in place: ``(params, grads, slots, scalars)``, each a list with an item a bucket."""
Differentiate = Callable[..., tuple[dict[str, Tensor], Any]]
"""``(leaves by name, ...) -> (their gradients by name, anything)``."""


class Plan:
    """What stays the same as long as the same tensors are stepped.

    ``besides`` are tensors that are written in the same step.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        flat: _tree.Flat,
        gs: Sequence[Tensor | None],
        state: State,
        *,
        split: bool,
        besides: Iterable[Tensor] = (),
    ) -> None:
        self._names = flat.names
        self._tensors = flat.leaves + _slot_tensors(state) + [*besides]
        self._wholes = flat.leaves if _sharding.any_dtensors(flat.leaves) else None
        tensors, leaves = self._local(self._tensors), self._local(flat.leaves)
        self._places = _places(leaves, tensors)
        self._without = [i for i, g in enumerate(gs) if g is None]
        _require_own_memory(tensors)
        self._written = {t.data_ptr() for t in tensors if t.numel()}
        self._storages = {_storage(t) for t in tensors if t.numel()}
        self._buckets = buckets
        whole = [[(i, range(len(bucket.index))) for i, bucket in enumerate(buckets)]]
        self.parts = [
            Part([(i, buckets[i].only(members)) for i, members in part], leaves, state)
            for part in (_split(buckets, leaves) if split else whole)
        ]

    def _local(self, tensors: Tensors) -> Tensors:
        return tensors if self._wholes is None else [_sharding.local(t) for t in tensors]

    def serves(
        self,
        flat: _tree.Flat,
        gs: Sequence[Tensor | None],
        state: State,
        besides: Iterable[Tensor] = (),
    ) -> bool:
        """Whether the same tensors came again."""
        tensors = flat.leaves + _slot_tensors(state) + [*besides]
        return (
            flat.names == self._names
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and _places(self._local(flat.leaves), self._local(tensors)) == self._places
            and [i for i, g in enumerate(gs) if g is None] == self._without
        )

    def arguments(
        self, gs: Sequence[Tensor | None], count: Tensor, state: State
    ) -> list[Arguments]:
        """What to call each part's compiled update with."""
        if self._wholes is not None:
            gs = [
                g if g is None else _local_gradient(name, g, p)
                for name, g, p in zip(self._names, gs, self._wholes, strict=True)
            ]
        given = [g for g in gs if g is not None]
        if any(map(Tensor._is_view, given)) or not self._written.isdisjoint(
            map(Tensor.data_ptr, given)
        ):
            # A gradient may be, or be a view into, a tensor that is written before it is read.
            gs = [g.clone() if g is not None and _storage(g) in self._storages else g for g in gs]
        # Outside the graph: Inductor would inline them, powers and all, into its loops.
        scalars = [bucket.scalars(count, state.hyperparams) for bucket in self._buckets]
        return [part.arguments(gs, scalars) for part in self.parts]


class Part:
    """Leaves that one graph steps, of one or more buckets."""

    def __init__(
        self, buckets: list[tuple[int, Bucket]], leaves: Sequence[Tensor], state: State
    ) -> None:
        self._from = [i for i, _ in buckets]
        self._params: list[Tensors] = []
        self._slots: list[Slots] = []
        self._buckets: list[Bucket] = []
        self._units: list[list[Unit | None]] = []
        self._hands: list[list[Hand]] = []
        for _, bucket in buckets:
            given = bucket.units
            ps = _pieces(bucket.pick(leaves), given)
            columns = {
                slot: _pieces(
                    [_sharding.local(state.slots[slot][name]) for name in bucket.names], given
                )
                for slot in bucket.rule.slots
            }
            pieces = [u for unit in given for u in _piece_units(unit)]
            hands = [
                _hand(u, [p, *slots])
                for u, p, *slots in zip(pieces, ps, *columns.values(), strict=True)
            ]
            units: list[Unit | None] = [
                Units(p.ndim - 1) if hand is _turn else u
                for p, u, hand in zip(ps, pieces, hands, strict=True)
            ]
            self._params.append([hand(p) for p, hand in zip(ps, hands, strict=True)])
            self._slots.append(
                {
                    slot: [hand(t) for t, hand in zip(column, hands, strict=True)]
                    for slot, column in columns.items()
                }
            )
            self._buckets.append(replace(bucket, units=units))
            self._units.append(given)
            self._hands.append(hands)
        self.key = tuple(
            (
                bucket.key,
                bucket.device,
                bucket.dtype,
                *given,
                *hands,
                *((p.shape, p.stride()) for p in ps),
                *(t.stride() for column in slots.values() for t in column),
            )
            for bucket, given, hands, ps, slots in zip(
                self._buckets, self._units, self._hands, self._params, self._slots, strict=True
            )
        )

    def arguments(self, gs: Sequence[Tensor | None], scalars: Sequence[Scalars]) -> Arguments:
        """What to call the compiled :meth:`update` with."""
        return (
            self._params,
            [bucket.pick(gs) for bucket in self._buckets],
            self._slots,
            [scalars[i] for i in self._from],
        )

    def update(self) -> Update:
        """The function to compile. It holds on to none of the tensors."""
        buckets, given, hands = self._buckets, self._units, self._hands

        def update(
            params: list[Tensors], grads: list[Tensors], slots: list[Slots], scalars: list[Scalars]
        ) -> None:
            for i, bucket in enumerate(buckets):
                gs = _pieces(grads[i], given[i])
                gs = [hand(g) for g, hand in zip(gs, hands[i], strict=True)]
                for g, p in zip(gs, params[i], strict=True):
                    # While it is traced only: another shape might broadcast.
                    if g.shape != p.shape or g.dtype != p.dtype:
                        raise ValueError("a gradient does not fit its parameter")
                new, columns = bucket.update(params[i], gs, slots[i], scalars[i])
                _write(params[i], new)
                for slot, column in columns.items():
                    _write(slots[i][slot], column)

        return update

    def update_after(self, differentiate: Differentiate) -> Callable[..., Any]:
        """The function to compile where the gradients are made in the same graph.

        It takes what the update takes but gradients, then what ``differentiate`` takes besides the
        leaves by name; and returns what that returns besides their gradients.
        """
        update, hands = self.update(), self._hands
        names = [bucket.names for bucket in self._buckets]

        def step(
            params: list[Tensors], slots: list[Slots], scalars: list[Scalars], *given: Any
        ) -> Any:
            leaves = {
                name: _BACK[hand](p)
                for row in zip(names, hands, params, strict=True)
                for name, hand, p in zip(*row, strict=True)
            }
            grads, results = differentiate(leaves, *given)
            update(params, [[grads[name] for name in own] for own in names], slots, scalars)
            return results

        return step


PER_CALL = 10
"""How many tensors compiled once must be saved to call one more graph in every step."""


def _split(
    buckets: Sequence[Bucket], leaves: Sequence[Tensor]
) -> Iterator[list[tuple[int, list[int]]]]:
    """Parts of which many are alike, so that they share a compiled graph.

    Inductor takes 0.2 to 0.5 s for each tensor on the CPU, alike or not. A model's tensors repeat:
    with n tensors of one kind, r parts of n // r need only n // r compiled.
    """
    kinds: dict[Hashable, list[tuple[int, int]]] = {}
    for i, bucket in enumerate(buckets):
        for j, (p, unit) in enumerate(zip(bucket.pick(leaves), bucket.units, strict=True)):
            kinds.setdefault((i, unit, p.shape, p.stride()), []).append((i, j))
    left = [iter(members) for members in kinds.values()]
    for repeats, taken in _repeats(tuple(len(members) for members in kinds.values())):
        for _ in range(repeats):
            part: dict[int, list[int]] = {}
            for members, n in zip(left, taken, strict=True):
                for i, j in itertools.islice(members, n):
                    part.setdefault(i, []).append(j)
            yield list(part.items())


@lru_cache
def _repeats(counts: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """How often to repeat which part, ``(repeats, tensors of each kind)``, for the least cost."""

    @cache
    def best(counts: tuple[int, ...], most: int) -> tuple[int, list[tuple[int, tuple[int, ...]]]]:
        if not any(counts):
            return 0, []
        options = []
        for r in range(1, min(most, max(counts)) + 1):
            taken = tuple(n // r for n in counts)
            cost, rest = best(tuple(n % r for n in counts), r - 1)
            options.append((cost + sum(taken) + PER_CALL * r, [(r, taken), *rest]))
        return min(options, key=operator.itemgetter(0))

    return best(counts, 16)[1]


def _pieces(tensors: Tensors, units: Sequence[Unit | None]) -> Tensors:
    """The tensors, packed ones of mixed units cut into uniform parts."""
    return [
        piece
        for t, unit in zip(tensors, units, strict=True)
        for piece in (cut(t, [m for m, _ in unit.parts]) if isinstance(unit, Stack) else [t])
    ]


def _piece_units(unit: Unit | None) -> list[Units | Sharded | None]:
    return [u for _, u in unit.parts] if isinstance(unit, Stack) else [unit]


def _write(old: Tensors, new: Tensors) -> None:
    for o, n in zip(old, new, strict=True):
        o.copy_(n)


Hand = Callable[[Tensor], Tensor]


def _hand(units: Unit | None, written: Tensors) -> Hand:
    """The view in which the graph gets a parameter, its slots and its gradient."""
    if written[0].ndim == 0:
        return _as_vector
    return _turn if units == ROWS and any(t.is_contiguous() for t in written) else _as_is


def _as_is(t: Tensor) -> Tensor:
    return t.detach()


def _turn(t: Tensor) -> Tensor:
    # On the CPU, Inductor crashes (KeyError: 'bufN') where a mean over rows and the in-place update
    # of a contiguous tensor share a graph: https://github.com/pytorch/pytorch/issues/188228.
    # With the dimensions reversed the tensor is not contiguous, and the loops come out the same.
    return t.detach().permute(*reversed(range(t.ndim)))


def _as_vector(t: Tensor) -> Tensor:
    # Inductor loses in-place writes to 0-d float64 tensors on the CPU.
    return t.detach().view(1)


def _as_scalar(t: Tensor) -> Tensor:
    return t.view(())


_BACK: dict[Hand, Hand] = {_as_is: _as_is, _turn: _turn, _as_vector: _as_scalar}
"""How a leaf comes out of the view in which the graph got it."""


def _local_gradient(name: str, g: Tensor, param: Tensor) -> Tensor:
    require_like("grads", name, g, param)
    return _sharding.local_like(g, param)


def _places(params: Tensors, tensors: Tensors) -> tuple[list[Any], ...]:
    """Where tensors lie: ``tensor.data = other`` keeps the object and moves it."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.size, params)),
        list(map(Tensor.stride, params)),
    )


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _slot_tensors(state: State) -> Tensors:
    return [tensor for column in state.slots.values() for tensor in column.values()]


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
