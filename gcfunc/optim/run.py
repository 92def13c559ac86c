"""A parameter group as functional trees, for as long as the same parameters are stepped."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from gcfunc._centralization.formula import Units
from gcfunc._compiled.graph import Graphs
from gcfunc._step.hyperparams import of_numpy
from gcfunc._step.optimizer import Optimizer
from gcfunc._step.state import State
from gcfunc._tensors import trees
from gcfunc.optim import inplace
from gcfunc.optim.counters import Counters, Entry, count_of
from gcfunc.optim.groups import Group, names_of, units_of

Options = tuple[tuple[str, Any], ...]


class Owner(Protocol):
    """What a run asks of the optimizer that it is for; see :class:`gcfunc.optim.base.DropIn`."""

    param_groups: list[Group]
    state: Any
    _counts: ClassVar[bool]
    _compile: bool | None
    _failures: list[Exception]

    def _compiles(self) -> bool: ...
    def _made_of(self, group: Group) -> object: ...
    def _functional_for(self, group: Group, *, centralizes: bool) -> tuple[Optimizer, Graphs]: ...
    def _hyperparam(self, group: Group, name: str, step: int) -> Any: ...


class GroupRun:
    """Those of a group's parameters that have gradients, by how many steps they have taken."""

    def __init__(self, optimizer: Owner, i: int, params: list[Tensor]) -> None:
        group = optimizer.param_groups[i]
        self._group = group
        self._gc, self._made_of = group["gc"], optimizer._made_of(group)
        self._params = [*params]
        self._dtypes = {p.dtype for p in params}
        names, units = names_of(group), units_of(group)
        ages: dict[int, list[int]] = {}
        for j, p in enumerate(params):
            ages.setdefault(count_of(optimizer.state.get(p, {})), []).append(j)
        self._ages = [
            (
                members,
                SameAge(
                    optimizer, group, count, {names[params[j]]: params[j] for j in members}, units
                ),
            )
            for count, members in ages.items()
        ]
        self._views = [optimizer.state[p].values() for p in params if p in optimizer.state]
        self._held = [*self._values()]

    def serves(self, optimizer: Owner, group: Group, params: list[Tensor]) -> bool:
        """Whether nothing was exchanged since the run was made."""
        return (
            group is self._group
            and len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and all(map(operator.is_, self._values(), self._held))
            and all(same.is_of_that_age() for _, same in self._ages)
            and group["gc"] is self._gc
            and optimizer._made_of(group) == self._made_of
        )

    def _values(self) -> Iterator[Any]:
        """All of the parameters' state, and an end that differs from any of it."""
        return itertools.chain(itertools.chain.from_iterable(self._views), (_END,))

    def step(self, optimizer: Owner, grads: list[Tensor]) -> None:
        """Step the parameters."""
        if {g.dtype for g in grads} != self._dtypes:
            grads = [_widened(g, p) for g, p in zip(grads, self._params, strict=True)]
        if self._group.get("maximize"):
            grads = [g.neg() for g in grads]
        for members, same in self._ages:
            every = len(members) == len(grads)
            own = grads if every else [grads[j] for j in members]
            same.step(optimizer, self._group, own)


_END = object()


def _widened(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient in the parameter's dtype where it fits in: ``grad_dtype`` may be another."""
    fits = torch.promote_types(grad.dtype, param.dtype) is param.dtype
    return grad.to(param.dtype) if fits else grad


class SameAge:
    """Parameters that have taken equally many steps: one functional state."""

    def __init__(
        self,
        optimizer: Owner,
        group: Group,
        count: int,
        params: dict[str, Tensor],
        units: dict[str, Units | None],
    ) -> None:
        self._flat, self._count = trees.flatten(params, "params"), count
        own = [units[name] for name in params]
        opt, graphs = optimizer._functional_for(group, centralizes=any(own))
        if optimizer._compiles():
            failures = optimizer._failures if optimizer._compile is None else None
            self._step = inplace.compiled(opt, own, graphs, failures)
        else:
            self._step = inplace.eager(opt, own)
        self._state = self._shared_state(optimizer, opt, params)
        self._given: dict[str, Any] = {}

    def _shared_state(self, optimizer: Owner, opt: Optimizer, params: dict[str, Tensor]) -> State:
        """A functional state of the very tensors that ``optimizer.state`` has, or gets here."""
        start = opt.start(self._flat, opt.groups(self._flat))
        # As in torch, what has no state has no entry either, and a counter comes first.
        keeps = optimizer._counts or start.slots
        entries: dict[str, Entry] = {n: optimizer.state[p] for n, p in params.items() if keeps}
        self._counters = Counters([*entries.values()] if optimizer._counts else [], self._count)
        for slot, first in start.slots.items():
            for name, entry in entries.items():
                entry[slot] = first[name] if entry.get(slot) is None else entry[slot]
        slots = {slot: {n: entry[slot] for n, entry in entries.items()} for slot in start.slots}
        step = torch.tensor(self._count, device=start.step.device)
        return State(step, start.hyperparams, slots)

    def is_of_that_age(self) -> bool:
        """Whether nobody else wrote one of the counters."""
        return self._counters.say(self._count)

    def step(self, optimizer: Owner, group: Group, grads: Sequence[Tensor]) -> None:
        """Update params and state in place."""
        step = self._count + 1
        for name, scalar in self._state.hyperparams.items():
            value = of_numpy(optimizer._hyperparam(group, name, step))
            if isinstance(value, Tensor):
                scalar.copy_(value.reshape(()))
                self._given.pop(name, None)
            elif self._given.get(name) != value:
                scalar.fill_(value)
                self._given[name] = value
        self._step(self._flat, grads, self._state)
        self._counters.add_one()
        self._count = step
