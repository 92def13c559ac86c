"""What every step does before it computes: take apart, check, group, and ask ``where``.

The eager step does so each time; compiled ones when other tensors come, see ``_compiled.planned``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcfunc._centralization.formula import Projection, Units
from gcfunc._centralization.kinds import of_tensor
from gcfunc._centralization.where import require_some, resolve
from gcfunc._step.bucket import Bucket, ListAlgorithm, join
from gcfunc._step.state import State, require_scalars, require_state
from gcfunc._tensors import trees
from gcfunc._tensors.check import require_like, require_tensors
from gcfunc._tensors.packed import Layout, Packed, SlotValues
from gcfunc._tensors.trees import FlatTree, Tree

Groups = Mapping[str, Sequence[int]]
"""The positions of each group's leaves."""


def _one_group(names: Sequence[str], leaves: Sequence[Tensor]) -> list[str]:
    return [""] * len(names)


@dataclass(frozen=True, eq=False, repr=False)
class Grouped:
    """Algorithms by the key of their group, and which group each leaf is in."""

    algorithms: Mapping[str, ListAlgorithm]
    assign: Callable[[Sequence[str], Sequence[Tensor]], list[str]] = _one_group

    def prepare(
        self, params: Tree, grads: Tree, state: State
    ) -> tuple[FlatTree, list[Tensor | None], list[Bucket]]:
        """Params, and gradients in their order, taken apart, and what is stepped together.

        Raises all that :meth:`gcfunc.Optimizer.step` does.
        """
        flat = trees.flatten(params, "params")
        require_tensors(flat.names, flat.leaves, "params")
        gs = trees.leaves_like(grads, flat.names, "grads", "params", flat.layout)
        return flat, gs, self.buckets(flat, gs, state)

    def buckets(
        self,
        flat: FlatTree,
        gs: Sequence[Tensor | None],
        state: State,
        units: Sequence[Units | None] | None = None,
    ) -> list[Bucket]:
        """What is stepped together, or the errors about gradients and state.

        ``units``, for each leaf, are given by whoever has asked ``where`` already.
        """
        _require_grads(flat.names, flat.leaves, gs)
        groups = self.groups(flat)
        self._require_state(flat, groups, state)
        if units is None:
            projections = self.projections(flat, groups)
        else:
            projections = [u and of_tensor(u, t) for u, t in zip(units, flat.leaves, strict=True)]
        buckets: list[Bucket] = []
        for key, members in groups.items():
            alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
            for i in members:
                if gs[i] is not None:
                    alike.setdefault((flat.leaves[i].device, flat.leaves[i].dtype), []).append(i)
            for (device, dtype), index in alike.items():
                names = [flat.names[i] for i in index]
                own = [projections[i] for i in index]
                buckets.append(Bucket(key, self.algorithms[key], device, dtype, index, names, own))
        return buckets

    def groups(self, flat: FlatTree) -> Groups:
        """Which leaves are in which group."""
        groups: dict[str, list[int]] = {key: [] for key in self.algorithms}
        for i, key in enumerate(self._keys(flat)):
            groups[key].append(i)
        return groups

    def projections(
        self, flat: FlatTree, groups: Groups, *, some: bool = False
    ) -> list[Projection | None]:
        """How each leaf is centralized; with ``some``, an error if a group's GC selects none."""
        found: list[Projection | None] = [None] * len(flat.names)
        for key, members in groups.items():
            gc = self.algorithms[key].gc
            if gc is not None:
                own = resolve(gc.where, flat, members)
                if some:
                    require_some(gc.where, own, flat, members)
                for i, projection in zip(members, own, strict=True):
                    found[i] = projection
        return found

    def _keys(self, flat: FlatTree) -> list[str]:
        if flat.layout is None:
            return self.assign(flat.names, flat.leaves)
        originals = flat.layout.originals(flat.leaves)
        names = list(originals)
        given = dict(zip(names, self.assign(names, list(originals.values())), strict=True))
        keys: list[str] = []
        for packed in flat.layout.tensors:
            named = {given[name]: name for piece in packed.pieces for name in piece.names}
            if len(named) > 1:
                pairs = ", ".join(f"{name!r} is {key!r}" for key, name in named.items())
                raise ValueError(
                    f"labels: the packed tensor {packed.name} holds tensors of several groups "
                    f"({pairs}); give gcfunc.pack the same labels"
                )
            keys += named
        return keys

    def _require_state(self, flat: FlatTree, groups: Groups, state: State) -> None:
        require_state(state)
        names, leaves = flat.names, flat.leaves
        algorithms = [(key, self.algorithms[key]) for key in groups]
        hyperparams = [join(key, n) for key, algorithm in algorithms for n in algorithm.hyperparams]
        slots = [slot for _, algorithm in algorithms for slot in algorithm.slots]
        own = "this optimizer's state"
        trees.require_names([*state.hyperparams], hyperparams, "state.hyperparams", own)
        trees.require_names([*state.slots], slots, "state.slots", own)
        require_scalars(state)
        for slot, values in state.slots.items():
            what = f"state.slots[{slot!r}]"
            members = [i for key, algo in algorithms if slot in algo.slots for i in groups[key]]
            have = _layout(values)
            if have != (flat.layout and flat.layout.only([names[i] for i in members])):
                raise ValueError(
                    f"{what} and params must be packed alike or not at all: make the state from "
                    "the packed params, and load it with gcfunc.load_state_dict"
                )
            trees.require_names([*values.keys()], [names[i] for i in members], what, "params")
            for i in members:
                require_like(what, names[i], values[names[i]], leaves[i], sharded=True)


def _layout(values: SlotValues) -> Layout | None:
    return values.layout if isinstance(values, Packed) else None


def _require_grads(names: Sequence[str], leaves: Sequence[Tensor], gs: Sequence[Any]) -> None:
    given = [i for i, g in enumerate(gs) if g is not None]
    if given:
        require_tensors([names[i] for i in given], [gs[i] for i in given], "grads")
    for i in given:
        require_like("grads", names[i], gs[i], leaves[i])
