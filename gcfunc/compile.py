"""Compiled stepping: all arithmetic on params as one graph, in place where they are given up."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gcfunc import _tree
from gcfunc._foreach import Tensors
from gcfunc._optimizer import Bucket, Optimizer
from gcfunc._packed import cut
from gcfunc._tree import Tree
from gcfunc._types import Scalars, Slots, State, require_state
from gcfunc.centralize import ROWS, Stack, Unit, Units

INDUCTOR_OPTIONS: dict[str, Any] = {
    # By default Inductor writes the moments to memory and reads them again for the parameter, as
    # the 0-d scalars they are made of count as reads.
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 256,
    # Dynamo's guards have just checked the same sizes and strides.
    "size_asserts": False,
}
"""What :func:`compile` tells Inductor, for its own graphs alone."""

Graph = Callable[[list[Tensors], list[Tensors], list[Slots], list[Scalars]], None]


def compile(  # noqa: A001
    opt: Optimizer, *, donate: bool = True, **torch_compile_kwargs: Any
) -> Compiled:
    """An optimizer whose step is compiled by :func:`torch.compile` into one graph.

    Args:
        opt: Any optimizer of this library.
        donate: ``True``: ``step`` updates the params and the state it is handed in place and
            returns them, as torch.optim does. ``False``: ``step`` stays pure.
        torch_compile_kwargs: For :func:`torch.compile`, such as ``mode`` or ``options``.
            ``fullgraph=True`` is set already, and a few of Inductor's options are; yours win.

    Returns:
        An object with the same ``init`` and ``step``. A changed hyperparameter does not compile
        again. Params of other names or shapes do, and so does another pattern of missing gradients:
        once each if donated, and up to torch's limit of 8 if not. A donated step keeps the tensors
        of its latest call alive.

    Raises:
        TypeError: ``opt`` is no optimizer of this library, or compiled already.
        ValueError: from a donated ``step``: tensors may share memory, because one overlaps itself
            or the address ranges of two overlap, so that they cannot be updated in place. Besides,
            what :meth:`gcfunc.Optimizer.step` raises.

    Example:
        >>> import torch, gcfunc
        >>> opt = gcfunc.compile(gcfunc.sgd(lr=0.1, gc="gc"))
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> state = opt.init(params)
        >>> stepped, state = opt.step(params, {"weight": torch.tensor([[1.0, 3.0]])}, state)
        >>> stepped is params, params["weight"]
        (True, tensor([[ 0.1000, -0.1000]]))
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(f"opt must be an optimizer such as gcfunc.sgd(0.1), got {opt!r}")
    kwargs = {"fullgraph": True, **torch_compile_kwargs}
    if kwargs.get("backend", "inductor") == "inductor":
        # torch.compile takes either a mode or options.
        mode = torch._inductor.list_mode_options(kwargs.pop("mode", None) or "default")
        kwargs["options"] = INDUCTOR_OPTIONS | mode | (kwargs.get("options") or {})
    # All functions compiled from one piece of source share a limit of 8 compilations unless told
    # otherwise, which torch can be since 2.13.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        kwargs.setdefault("isolate_recompiles", True)
    return Donated(opt, kwargs) if donate else Compiled(opt, kwargs)


class Compiled:
    """An optimizer whose pure ``step`` is compiled; :func:`gcfunc.compile` makes it."""

    def __init__(self, opt: Optimizer, kwargs: dict[str, Any]) -> None:
        self._opt = opt
        self._kwargs = kwargs
        self._step = torch.compile(opt.step, **kwargs)

    def init(self, params: Tree) -> State:
        """As :meth:`gcfunc.Optimizer.init`."""
        return self._opt.init(params)

    def step(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """As :meth:`gcfunc.Optimizer.step`."""
        return self._step(params, grads, state)

    def __repr__(self) -> str:
        return f"compile({self._opt!r})"


class Donated(Compiled):
    """An optimizer that steps in place; :func:`gcfunc.compile` makes it."""

    def __init__(self, opt: Optimizer, kwargs: dict[str, Any]) -> None:
        super().__init__(opt, kwargs)
        self._graphs: dict[Any, Graph] = {}
        self._serving: tuple[_Plan, Graph] | None = None

    @torch.no_grad()
    def init(self, params: Tree) -> State:
        """As :meth:`gcfunc.Optimizer.init`, but no autograd history is recorded."""
        return super().init(params)

    @torch.no_grad()
    def step(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """As :meth:`gcfunc.Optimizer.step`, but params and state are updated in place.

        The trees returned are the very ones handed in. No autograd history is recorded.
        """
        flat = _tree.flatten(params, "params")
        gs = _tree.leaves_like(grads, flat.names, "grads", "params", flat.layout)
        require_state(state)
        serving = self._serving  # read once: another thread may step another model
        if serving is None or not serving[0].serves(flat, gs, state):
            _, _, buckets = self._opt.prepare(params, grads, state)
            plan = _Plan(buckets, flat, gs, state)
            if plan.key not in self._graphs:
                self._graphs[plan.key] = torch.compile(plan.in_place(), **self._kwargs)
            serving = self._serving = plan, self._graphs[plan.key]
        plan, graph = serving
        try:
            plan.run(graph, gs, state)
        except Exception:
            # A trace that failed says so in torch's words; if it was the user's input, in ours.
            self._opt.prepare(params, grads, state)
            raise
        return params, state


class _Plan:
    """What stays the same as long as the same tensors are stepped."""

    def __init__(
        self,
        buckets: list[Bucket],
        flat: _tree.Flat,
        gs: Sequence[Tensor | None],
        state: State,
    ) -> None:
        self._names = flat.names
        self._tensors = flat.leaves + _slot_tensors(state)
        self._places = _places(flat.leaves)
        self._without = [g is None for g in gs]
        _require_own_memory(self._tensors)
        self._addresses = {t.data_ptr() for t in self._tensors if t.numel()}
        self._params: list[Tensors] = []
        self._slots: list[Slots] = []
        self._buckets: list[Bucket] = []
        self._whole: list[list[Unit | None]] = []
        self._hands: list[list[_Hand]] = []
        for bucket in buckets:
            whole = bucket.units
            ps = _pieces(bucket.pick(flat.leaves), whole)
            columns = {
                slot: _pieces([state.slots[slot][name] for name in bucket.names], whole)
                for slot in bucket.rule.slots
            }
            pieces = [u for unit in whole for u in _piece_units(unit)]
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
            self._whole.append(whole)
            self._hands.append(hands)
        self.key = tuple(
            (b.key, b.device, b.dtype, *whole, *hands, *((p.shape, p.stride()) for p in ps))
            for b, whole, hands, ps in zip(
                self._buckets, self._whole, self._hands, self._params, strict=True
            )
        )

    def serves(self, flat: _tree.Flat, gs: Sequence[Tensor | None], state: State) -> bool:
        """Whether the same tensors came again."""
        tensors = flat.leaves + _slot_tensors(state)
        return (
            flat.names == self._names
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and _places(flat.leaves) == self._places
            and [g is None for g in gs] == self._without
        )

    def run(self, graph: Graph, gs: Sequence[Tensor | None], state: State) -> None:
        """One step, by a compiled :meth:`in_place`."""
        count = state.step + 1
        graph(
            self._params,
            [self._apart(bucket.pick(gs)) for bucket in self._buckets],
            self._slots,
            # Outside the graph: Inductor would inline them, powers and all, into its loops.
            [bucket.scalars(count, state.hyperparams) for bucket in self._buckets],
        )
        state.step.copy_(count)

    def _apart(self, gs: Tensors) -> Tensors:
        """The gradients, copied where they are the very tensors to be written."""
        return [g.clone() if g.data_ptr() in self._addresses else g for g in gs]

    def in_place(self) -> Graph:
        """The function that is compiled. It holds on to none of the tensors."""
        buckets, whole, hands = self._buckets, self._whole, self._hands

        def step(
            params: list[Tensors], grads: list[Tensors], slots: list[Slots], scalars: list[Scalars]
        ) -> None:
            for i, bucket in enumerate(buckets):
                gs = _pieces(grads[i], whole[i])
                gs = [hand(g) for g, hand in zip(gs, hands[i], strict=True)]
                for g, p in zip(gs, params[i], strict=True):
                    # While it is traced only: another shape might broadcast.
                    if g.shape != p.shape or g.dtype != p.dtype:
                        raise ValueError("a gradient does not fit its parameter")
                new, columns = bucket.update(params[i], gs, slots[i], scalars[i])
                _write(params[i], new)
                for slot, column in columns.items():
                    _write(slots[i][slot], column)

        return step


def _pieces(tensors: Tensors, units: Sequence[Unit | None]) -> Tensors:
    """The tensors, packed ones of mixed units cut into uniform parts."""
    return [
        piece
        for t, unit in zip(tensors, units, strict=True)
        for piece in (cut(t, [m for m, _ in unit.parts]) if isinstance(unit, Stack) else [t])
    ]


def _piece_units(unit: Unit | None) -> list[Units | None]:
    return [u for _, u in unit.parts] if isinstance(unit, Stack) else [unit]


def _write(old: Tensors, new: Tensors) -> None:
    for o, n in zip(old, new, strict=True):
        o.copy_(n)


_Hand = Callable[[Tensor], Tensor]


def _hand(units: Units | None, written: Tensors) -> _Hand:
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


def _places(params: Tensors) -> list[tuple[Any, ...]]:
    """Where params lie: ``param.data = other`` keeps the object and moves it."""
    return list(zip(map(Tensor.data_ptr, params), map(Tensor.stride, params), strict=True))


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
