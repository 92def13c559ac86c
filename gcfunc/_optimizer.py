"""The optimizer object: trees in, trees out, rules on lists in between."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcfunc import _tree
from gcfunc._check import require_like, require_tensors
from gcfunc._foreach import Tensors
from gcfunc._hyperparams import to_scalars
from gcfunc._tree import Tree
from gcfunc._types import Rule, State
from gcfunc.centralize import Units, compute_dtype, resolve


def _one_group(names: Sequence[str], leaves: Sequence[Tensor]) -> list[str]:
    return [""] * len(names)


@dataclass(frozen=True, repr=False)
class Optimizer:
    """A pure functional optimizer: ``init`` makes a state, ``step`` makes the next one.

    Made by :func:`gcfunc.sgd` and its sisters, not by hand. It holds no tensors but hyperparameters
    given as tensors, and may serve any number of models.
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
        names, leaves, _ = _tree.flatten(params, "params")
        require_tensors(names, leaves, "params")
        device = leaves[0].device
        hyperparams: dict[str, Tensor] = {}
        slots: dict[str, dict[str, Tensor]] = {}
        for key, members in self._groups(names, leaves).items():
            rule = self.rules[key]
            _units(rule, names, leaves, members)
            for name, scalar in to_scalars(rule.hyperparams, device).items():
                hyperparams[join(key, name)] = scalar
            for slot, start in rule.slots.items():
                column = slots.setdefault(slot, {})
                column.update({names[i]: start(leaves[i]) for i in members})
        step = torch.zeros((), dtype=torch.int64, device=device)
        return State(step, hyperparams, slots)

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
            ``(params, state)`` with the structure, dtypes, devices and strides of the arguments.
            Arithmetic on 16-bit parameters runs in float32 and is rounded once, on the way out.

        Raises:
            TypeError: a leaf of params or grads is not of a supported kind, or ``state`` is no
                :class:`State`.
            ValueError: grads or state do not match params in structure, shape, dtype or device.
        """
        names, leaves, rebuild = _tree.flatten(params, "params")
        require_tensors(names, leaves, "params")
        gs = _tree.leaves_like(_tree.flatten(grads, "grads"), names, "grads", "params")
        _require_grads(names, leaves, gs)
        groups = self._groups(names, leaves)
        self._require_state(names, leaves, groups, state)

        count = state.step + 1
        new_leaves: dict[str, Tensor] = {}
        new_slots: dict[str, dict[str, Tensor]] = {slot: {} for slot in state.slots}
        for key, members in groups.items():
            rule = self.rules[key]
            units = dict(zip(members, _units(rule, names, leaves, members), strict=True))
            own = {name: state.hyperparams[join(key, name)] for name in rule.hyperparams}
            scalars = rule.scalars(count, own)
            for (device, dtype), index in _buckets(leaves, gs, members).items():
                wide = compute_dtype(dtype)
                bucket = [names[i] for i in index]
                columns = {slot: [state.slots[slot][n] for n in bucket] for slot in rule.slots}
                ps, columns = rule.update(
                    _cast([leaves[i] for i in index], wide),
                    _cast([gs[i] for i in index], wide),
                    {slot: _cast(column, wide) for slot, column in columns.items()},
                    {name: _cast_scalar(s, device, wide) for name, s in scalars.items()},
                    [units[i] for i in index],
                )
                new_leaves.update(zip(bucket, _cast(ps, dtype), strict=True))
                for slot, column in columns.items():
                    new_slots[slot].update(zip(bucket, _cast(column, dtype), strict=True))
        return (
            rebuild(_or_clones(new_leaves, dict(zip(names, leaves, strict=True)))),
            State(
                count,
                {name: scalar.clone() for name, scalar in state.hyperparams.items()},
                {
                    slot: dict(zip(old, _or_clones(new_slots[slot], old), strict=True))
                    for slot, old in state.slots.items()
                },
            ),
        )

    def _groups(self, names: Sequence[str], leaves: Sequence[Tensor]) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {key: [] for key in self.rules}
        for i, key in enumerate(self.assign(names, leaves)):
            groups[key].append(i)
        return groups

    def _require_state(
        self,
        names: Sequence[str],
        leaves: Sequence[Tensor],
        groups: Mapping[str, Sequence[int]],
        state: State,
    ) -> None:
        if not isinstance(state, State):
            raise TypeError(f"state must come from init or step, got {type(state).__name__}")
        rules = [(key, self.rules[key]) for key in groups]
        hyperparams = [join(key, name) for key, rule in rules for name in rule.hyperparams]
        slots = [slot for _, rule in rules for slot in rule.slots]
        own = "this optimizer's state"
        _tree.require_names([*state.hyperparams], hyperparams, "state.hyperparams", own)
        _tree.require_names([*state.slots], slots, "state.slots", own)
        for slot, column in state.slots.items():
            what = f"state.slots[{slot!r}]"
            members = [i for key, rule in rules if slot in rule.slots for i in groups[key]]
            _tree.require_names([*column], [names[i] for i in members], what, "params")
            for i in members:
                require_like(what, names[i], column[names[i]], leaves[i])

    def __repr__(self) -> str:
        shown = []
        for key, rule in self.rules.items():
            values = [f"{name}={value}" for name, value in rule.hyperparams.items()]
            values += [f"gc={rule.gc}"] if rule.gc else []
            shown.append((f"{key}: " if key else "") + f"{rule.name}({', '.join(values)})")
        return "; ".join(shown)


def join(key: str, name: str) -> str:
    """A name under a group's key; either may be empty."""
    return f"{key}.{name}" if key and name else key + name


def _units(
    rule: Rule, names: Sequence[str], leaves: Sequence[Tensor], members: Sequence[int]
) -> list[Units | None]:
    if rule.gc is None:
        return [None] * len(members)
    return resolve(rule.gc.where, names, leaves, members)


def _buckets(
    leaves: Sequence[Tensor], gs: Sequence[Tensor | None], members: Sequence[int]
) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    buckets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i in members:
        if gs[i] is not None:
            buckets.setdefault((leaves[i].device, leaves[i].dtype), []).append(i)
    return buckets


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """A bucket in another dtype; the very same list if it has it already."""
    return tensors if tensors[0].dtype is dtype else [t.to(dtype) for t in tensors]


def _cast_scalar(scalar: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return scalar.to(device, dtype if scalar.is_floating_point() else scalar.dtype)


def _or_clones(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensors:
    return [new[name] if name in new else tensor.clone() for name, tensor in old.items()]


def _require_grads(names: Sequence[str], leaves: Sequence[Tensor], gs: Sequence[Any]) -> None:
    given = [i for i, g in enumerate(gs) if g is not None]
    if given:
        require_tensors([names[i] for i in given], [gs[i] for i in given], "grads")
    for i in given:
        require_like("grads", names[i], gs[i], leaves[i])
