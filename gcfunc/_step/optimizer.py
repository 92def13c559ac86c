"""The optimizer object: trees in, trees out, algorithms on lists in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfunc._step import history
from gcfunc._step.bucket import Bucket, Slots, join
from gcfunc._step.hyperparams import to_scalars
from gcfunc._step.prepare import Grouped, Groups
from gcfunc._step.state import State
from gcfunc._tensors import sharding, trees
from gcfunc._tensors.check import require_tensors
from gcfunc._tensors.lists import Tensors, numbers_copied, under_vmap
from gcfunc._tensors.packed import SlotValues, slot_values
from gcfunc._tensors.trees import FlatTree, Tree


@dataclass(frozen=True, eq=False, repr=False)
class Optimizer(Grouped):
    """A pure functional optimizer: ``init`` makes a state, ``step`` makes the next one.

    Made by :func:`gcfunc.sgd` and its sisters, not by hand. It holds no tensors but hyperparameters
    given as tensors, and may serve any number of models. It is code, not data: to go on elsewhere,
    build it again and load the state.
    """

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
        flat = trees.flatten(params, "params")
        require_tensors(flat.names, flat.leaves, "params")
        groups = self.groups(flat)
        self.projections(flat, groups, some=True)
        return self.start(flat, groups)

    def start(self, flat: FlatTree, groups: Groups) -> State:
        """:meth:`init` for whoever has checked the params already."""
        device = flat.leaves[0].device
        hyperparams: dict[str, Tensor] = {}
        slots: dict[str, dict[str, Tensor]] = {}
        for key, members in groups.items():
            algorithm = self.algorithms[key]
            for name, scalar in to_scalars(algorithm.hyperparams, device).items():
                hyperparams[join(key, name)] = scalar
            for slot, first in algorithm.slots.items():
                values = slots.setdefault(slot, {})
                values.update({flat.names[i]: first(flat.leaves[i]) for i in members})
        step = torch.zeros((), dtype=torch.int64, device=device)
        return State(
            step, hyperparams, {slot: slot_values(flat.layout, v) for slot, v in slots.items()}
        )

    def step(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """One step: new params and new state.

        Nothing is written, and nothing returned shares memory with an argument.

        The step is differentiable. In a training loop run it under ``torch.no_grad()``, or on
        detached params: with params that require grad, autograd records every step upon the one
        before, and memory grows without end. A ``UserWarning`` says so once, in the line that calls
        ``step``, after 20 such steps in a row, or 100 if gradients or hyperparameters require grad
        too, as they do where one learns through steps. It never does inside of
        :func:`torch.func.grad`, nor in a ``torch.compile`` of your own.

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
        flat, gs, buckets = self.prepare(params, grads, state)
        new, new_state = stepped(flat, gs, state, buckets)
        if not torch.compiler.is_compiling():
            history.follow(flat.leaves, gs, state, new, new_state)
        return flat.rebuild(new), new_state

    def __repr__(self) -> str:
        shown = []
        for key, algorithm in self.algorithms.items():
            values = [f"{name}={value}" for name, value in algorithm.hyperparams.items()]
            values += [f"gc={algorithm.gc}"] if algorithm.gc else []
            shown.append((f"{key}: " if key else "") + f"{algorithm.name}({', '.join(values)})")
        return "; ".join(shown)


BucketStep = Callable[[Bucket, Tensors, Tensors, Slots, State, Tensor], tuple[Tensors, Slots]]
"""``(bucket, params, grads, slots, state before, count with this step) -> (params, slots)``."""


def step_bucket(
    bucket: Bucket, params: Tensors, grads: Tensors, slots: Slots, state: State, count: Tensor
) -> tuple[Tensors, Slots]:
    """The update of a bucket with the scalars of a step."""
    scalars = bucket.scalars(count, bucket.own(state.hyperparams))
    return bucket.update(params, grads, slots, scalars)


def stepped(
    flat: FlatTree,
    gs: Sequence[Tensor | None],
    state: State,
    buckets: Sequence[Bucket],
    step_one: BucketStep = step_bucket,
) -> tuple[Tensors, State]:
    """The leaves and the state after a step, out of place."""
    names, leaves, _, layout = flat
    count = state.step + 1
    new: dict[str, Tensor] = {}
    new_slots: dict[str, dict[str, Tensor]] = {slot: {} for slot in state.slots}
    for bucket in buckets:
        params = bucket.pick(leaves)
        ps = [sharding.local(p) for p in params]
        slots = {
            slot: [sharding.local(state.slots[slot][name]) for name in bucket.names]
            for slot in bucket.algorithm.slots
        }
        grads = [sharding.local_like(g, p) for g, p in zip(bucket.pick(gs), params, strict=True)]
        next_ps, next_slots = step_one(bucket, ps, grads, slots, state, count)
        new.update(zip(bucket.names, _laid_out(next_ps, ps, params), strict=True))
        for slot, values in next_slots.items():
            values = _laid_out(values, slots[slot], params)
            new_slots[slot].update(zip(bucket.names, values, strict=True))
    return [*_or_clones(new, dict(zip(names, leaves, strict=True))).values()], State(
        count,
        _copied(state.hyperparams),
        {
            slot: slot_values(layout, _or_clones(new_slots[slot], values))
            for slot, values in state.slots.items()
        },
    )


def _copied(scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
    alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, scalar in scalars.items():
        alike.setdefault((scalar.dtype, scalar.device), []).append(name)
    new: dict[str, Tensor] = {}
    for names in alike.values():
        new.update(zip(names, numbers_copied([scalars[n] for n in names]), strict=True))
    return {name: new[name] for name in scalars}


def _laid_out(new: Tensors, old: Tensors, like: Tensors) -> Tensors:
    """The new tensors with the strides of the old, and sharded as ``like`` is.

    Strides differ where a dimension has size 1 and the gradient is laid out otherwise, as that of a
    depthwise weight in channels_last is.
    """
    if under_vmap():
        return new
    return [
        sharding.from_shard(n if n.stride() == o.stride() else torch.empty_like(o).copy_(n), t)
        for n, o, t in zip(new, old, like, strict=True)
    ]


def _or_clones(new: Mapping[str, Tensor], old: SlotValues) -> dict[str, Tensor]:
    return {name: new[name] if name in new else t.clone() for name, t in old.items()}
