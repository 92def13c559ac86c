"""The optimizer object: trees in, trees out, rules on lists in between."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gcfunc import _sharding, _tree
from gcfunc._check import require_like, require_tensors
from gcfunc._foreach import Tensors, compute_dtype, under_vmap
from gcfunc._hyperparams import to_scalars
from gcfunc._packed import Column, Layout, Packed, column_like
from gcfunc._tree import Flat, Tree
from gcfunc._types import Rule, Scalars, Slots, State, require_state
from gcfunc.centralize import Unit, of_parts, resolve


@dataclass(frozen=True, eq=False)
class Bucket:
    """Leaves that one rule steps together: one group, one device, one dtype."""

    key: str
    rule: Rule
    device: torch.device
    dtype: torch.dtype
    index: list[int]
    names: list[str]
    units: list[Unit | None]

    def pick(self, tensors: Sequence[Tensor | None]) -> Tensors:
        """The bucket's own out of one tensor for each leaf."""
        # Not in one comprehension: torch.compile cannot trace := inside of one.
        own = [tensors[i] for i in self.index]
        return [t for t in own if t is not None]

    def only(self, members: Sequence[int]) -> "Bucket":
        """The bucket with some of its leaves, by their position in it."""
        return replace(
            self,
            index=[self.index[j] for j in members],
            names=[self.names[j] for j in members],
            units=[self.units[j] for j in members],
        )

    def scalars(self, count: Tensor, hyperparams: Scalars) -> Scalars:
        """The step's scalars, each cast once to what the lists are computed in."""
        own = {name: hyperparams[join(self.key, name)] for name in self.rule.hyperparams}
        wide = compute_dtype(self.dtype)
        # Copies, as a compiled graph would take two of one tensor for the same forever.
        return {
            name: scalar.to(
                self.device, scalar.dtype if scalar.dtype is torch.bool else wide, copy=True
            )
            for name, scalar in self.rule.scalars(count, own).items()
        }

    def update(
        self, params: Tensors, grads: Tensors, slots: Slots, scalars: Scalars
    ) -> tuple[Tensors, Slots]:
        """The rule's update, computed wide and rounded once."""
        wide = compute_dtype(self.dtype)
        params, slots = self.rule.update(
            _cast(params, wide),
            _cast(grads, wide),
            {slot: _cast(column, wide) for slot, column in slots.items()},
            scalars,
            self.units,
        )
        return _cast(params, self.dtype), {
            slot: _cast(column, self.dtype) for slot, column in slots.items()
        }


def _one_group(names: Sequence[str], leaves: Sequence[Tensor]) -> list[str]:
    return [""] * len(names)


@dataclass(frozen=True, eq=False, repr=False)
class Optimizer:
    """A pure functional optimizer: ``init`` makes a state, ``step`` makes the next one.

    Made by :func:`gcfunc.sgd` and its sisters, not by hand. It holds no tensors but hyperparameters
    given as tensors, and may serve any number of models. It is code, not data: to go on elsewhere,
    build it again and load the state.
    """

    rules: Mapping[str, Rule]
    assign: Callable[[Sequence[str], Sequence[Tensor]], list[str]] = _one_group

    def init(self, params: Tree) -> State:
        """The state before the first step.

        Args:
            params: A pytree of tensors, usually ``dict(model.named_parameters())``. A tensor that
                stands under two names is two parameters; ``named_parameters`` lists tied weights
                once, which is what training wants.

        Raises:
            TypeError: a leaf is no strided tensor of dtype float16, bfloat16, float32 or float64.
            ValueError: no tensors, or GC selects none of them.
        """
        flat = _tree.flatten(params, "params")
        names, leaves = flat.names, flat.leaves
        require_tensors(names, leaves, "params")
        device = leaves[0].device
        hyperparams: dict[str, Tensor] = {}
        slots: dict[str, dict[str, Tensor]] = {}
        for key, members in self._groups(flat).items():
            rule = self.rules[key]
            self._units(key, flat, members)
            for name, scalar in to_scalars(rule.hyperparams, device).items():
                hyperparams[join(key, name)] = scalar
            for slot, start in rule.slots.items():
                column = slots.setdefault(slot, {})
                column.update({names[i]: start(leaves[i]) for i in members})
        step = torch.zeros((), dtype=torch.int64, device=device)
        columns = {slot: column_like(flat.layout, column) for slot, column in slots.items()}
        return State(step, hyperparams, columns)

    def step(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """One step: new params and new state. Nothing is written, nothing returned is aliased.

        The step is differentiable. In a training loop run it under ``torch.no_grad()``, or on
        detached params: with params that require grad, autograd would record every step.

        Args:
            params: As given to :meth:`init`.
            grads: The same structure; ``None`` for a parameter that got no gradient, which is then
                left alone, its state too.
            state: From :meth:`init` or the step before.

        Returns:
            ``(params, state)`` with the structure, dtypes and devices of the arguments, and their
            strides where these leave no gaps; views of something larger become dense.
            Arithmetic on 16-bit parameters runs in float32 and is rounded once, on the way out.

        Raises:
            TypeError: a leaf of params or grads is not of a supported kind, or ``state`` is no
                :class:`State`.
            ValueError: grads or state do not match params in structure, shape, dtype or device.
        """
        (names, leaves, rebuild, layout), gs, buckets = self.prepare(params, grads, state)
        old = dict(zip(names, leaves, strict=True))
        count = state.step + 1
        new: dict[str, Tensor] = {}
        new_slots: dict[str, dict[str, Tensor]] = {slot: {} for slot in state.slots}
        for bucket in buckets:
            wholes = bucket.pick(leaves)
            ps = [_sharding.local(p) for p in wholes]
            columns = {
                slot: [_sharding.local(state.slots[slot][name]) for name in bucket.names]
                for slot in bucket.rule.slots
            }
            stepped, new_columns = bucket.update(
                ps,
                [_sharding.local_like(g, p) for g, p in zip(bucket.pick(gs), wholes, strict=True)],
                columns,
                bucket.scalars(count, state.hyperparams),
            )
            new.update(zip(bucket.names, _laid_out(stepped, ps, wholes), strict=True))
            for slot, column in new_columns.items():
                column = _laid_out(column, columns[slot], wholes)
                new_slots[slot].update(zip(bucket.names, column, strict=True))
        return (
            rebuild([*_or_clones(new, old).values()]),
            State(
                count,
                {name: scalar.clone() for name, scalar in state.hyperparams.items()},
                {
                    slot: column_like(layout, _or_clones(new_slots[slot], column))
                    for slot, column in state.slots.items()
                },
            ),
        )

    def prepare(
        self, params: Tree, grads: Tree, state: State
    ) -> tuple[_tree.Flat, list[Tensor | None], list[Bucket]]:
        """The arguments of :meth:`step` taken apart, or the errors that it raises."""
        flat = _tree.flatten(params, "params")
        require_tensors(flat.names, flat.leaves, "params")
        gs = _tree.leaves_like(grads, flat.names, "grads", "params", flat.layout)
        return flat, gs, self.buckets(flat, gs, state)

    def buckets(self, flat: Flat, gs: Sequence[Tensor | None], state: State) -> list[Bucket]:
        """What is stepped together, or the errors about gradients and state."""
        _require_grads(flat.names, flat.leaves, gs)
        groups = self._groups(flat)
        self._require_state(flat, groups, state)
        return self._buckets(flat, gs, groups)

    def _groups(self, flat: Flat) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {key: [] for key in self.rules}
        for i, key in enumerate(self._keys(flat)):
            groups[key].append(i)
        return groups

    def _keys(self, flat: Flat) -> list[str]:
        if flat.layout is None:
            return self.assign(flat.names, flat.leaves)
        originals = flat.layout.originals(flat.leaves)
        names = list(originals)
        given = dict(zip(names, self.assign(names, list(originals.values())), strict=True))
        keys: list[str] = []
        for leaf in flat.layout.leaves:
            named = {given[name]: name for member in leaf.members for name in member.names}
            if len(named) > 1:
                pairs = ", ".join(f"{name!r} is {key!r}" for key, name in named.items())
                raise ValueError(
                    f"labels: the packed tensor {leaf.name} holds tensors of several groups "
                    f"({pairs}); give gcfunc.pack the same labels"
                )
            keys += named
        return keys

    def _buckets(
        self, flat: Flat, gs: Sequence[Tensor | None], groups: Mapping[str, Sequence[int]]
    ) -> list[Bucket]:
        names, leaves = flat.names, flat.leaves
        buckets: list[Bucket] = []
        for key, members in groups.items():
            units = dict(zip(members, self._units(key, flat, members), strict=True))
            alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
            for i in members:
                if gs[i] is not None:
                    alike.setdefault((leaves[i].device, leaves[i].dtype), []).append(i)
            for (device, dtype), index in alike.items():
                bucket_names = [names[i] for i in index]
                bucket_units = [units[i] for i in index]
                buckets.append(
                    Bucket(key, self.rules[key], device, dtype, index, bucket_names, bucket_units)
                )
        return buckets

    def _units(self, key: str, flat: Flat, members: Sequence[int]) -> list[Unit | None]:
        gc = self.rules[key].gc
        if gc is None:
            return [None] * len(members)
        units = resolve(gc.where, flat, members)
        return of_parts(units, [flat.leaves[i] for i in members])

    def _require_state(self, flat: Flat, groups: Mapping[str, Sequence[int]], state: State) -> None:
        require_state(state)
        names, leaves = flat.names, flat.leaves
        rules = [(key, self.rules[key]) for key in groups]
        hyperparams = [join(key, name) for key, rule in rules for name in rule.hyperparams]
        slots = [slot for _, rule in rules for slot in rule.slots]
        own = "this optimizer's state"
        _tree.require_names([*state.hyperparams], hyperparams, "state.hyperparams", own)
        _tree.require_names([*state.slots], slots, "state.slots", own)
        require_scalars(state)
        for slot, column in state.slots.items():
            what = f"state.slots[{slot!r}]"
            members = [i for key, rule in rules if slot in rule.slots for i in groups[key]]
            have = _layout(column)
            if have != (flat.layout and flat.layout.only([names[i] for i in members])):
                raise ValueError(
                    f"{what} and params must be packed alike or not at all: make the state from "
                    "the packed params, and load it with gcfunc.load_state_dict"
                )
            _tree.require_names([*column], [names[i] for i in members], what, "params")
            for i in members:
                require_like(what, names[i], column[names[i]], leaves[i], sharded=True)

    def __repr__(self) -> str:
        shown = []
        for key, rule in self.rules.items():
            values = [f"{name}={value}" for name, value in rule.hyperparams.items()]
            values += [f"gc={rule.gc}"] if rule.gc else []
            shown.append((f"{key}: " if key else "") + f"{rule.name}({', '.join(values)})")
        return "; ".join(shown)


def require_scalars(state: State) -> None:
    """Raise TypeError unless step and hyperparameters are 0-d tensors."""
    for name, scalar in (("step", state.step), *state.hyperparams.items()):
        if not isinstance(scalar, Tensor) or scalar.ndim:
            raise TypeError(
                f"state: {name!r} must be a 0-d tensor, got {scalar!r}; "
                "gcfunc.update_hyperparams makes one of a number"
            )


def join(key: str, name: str) -> str:
    """A name under a group's key; either may be empty."""
    return f"{key}.{name}" if key and name else key + name


def _layout(column: Column) -> Layout | None:
    return column.layout if isinstance(column, Packed) else None


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """A bucket in another dtype; the very same list if it has it already."""
    return tensors if tensors[0].dtype is dtype else [t.to(dtype) for t in tensors]


def _laid_out(new: Tensors, old: Tensors, wholes: Tensors) -> Tensors:
    """The new tensors with the strides of the old, and sharded as ``wholes`` are.

    Strides differ where a dimension has size 1 and the gradient is laid out otherwise, as that of a
    depthwise weight in channels_last is.
    """
    if under_vmap():
        return new
    return [
        _sharding.whole(n if n.stride() == o.stride() else torch.empty_like(o).copy_(n), like)
        for n, o, like in zip(new, old, wholes, strict=True)
    ]


def _or_clones(new: Mapping[str, Tensor], old: Column) -> dict[str, Tensor]:
    return {name: new[name] if name in new else t.clone() for name, t in old.items()}


def _require_grads(names: Sequence[str], leaves: Sequence[Tensor], gs: Sequence[Any]) -> None:
    given = [i for i, g in enumerate(gs) if g is not None]
    if given:
        require_tensors([names[i] for i in given], [gs[i] for i in given], "grads")
    for i in given:
        require_like("grads", names[i], gs[i], leaves[i])
