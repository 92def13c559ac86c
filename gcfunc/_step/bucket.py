"""What is stepped together: an algorithm, and the leaves of one device and dtype it is for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gcfunc._centralization.formula import Projection
from gcfunc._centralization.where import GC
from gcfunc._step.hyperparams import Number
from gcfunc._tensors.lists import Tensors, compute_dtype

Scalars = Mapping[str, Tensor]
Slots = dict[str, Tensors]
Projections = Sequence[Projection | None]
"""For each tensor, how it is centralized; ``None`` for not at all."""


@dataclass(frozen=True, eq=False)
class ListAlgorithm:
    """One algorithm on lists of tensors that share a dtype and a device.

    Attributes:
        name: The constructor's name, for messages.
        hyperparams: Initial hyperparameters.
        slots: For each running quantity, what it starts as for a given parameter, with the
            parameter's shape and dtype.
        scalars: ``(step, hyperparams) -> scalars``: all scalar arithmetic of a step, in float64.
        update: ``(params, grads, slots, scalars, projections) -> (params, slots)``, out of place.
            The scalars arrive in the lists' dtype.
        gc: Which leaves have a projection, for ``update`` to apply where it says.
    """

    name: str
    hyperparams: Mapping[str, Number]
    slots: Mapping[str, Callable[[Tensor], Tensor]]
    scalars: Callable[[Tensor, Scalars], dict[str, Tensor]]
    update: Callable[[Tensors, Tensors, Slots, Scalars, Projections], tuple[Tensors, Slots]]
    gc: GC | None


@dataclass(frozen=True, eq=False)
class Bucket:
    """Leaves that one algorithm steps together: one group, one device, one dtype."""

    key: str
    algorithm: ListAlgorithm
    device: torch.device
    dtype: torch.dtype
    index: list[int]
    names: list[str]
    projections: list[Projection | None]

    def pick(self, tensors: Sequence[Tensor | None]) -> Tensors:
        """The bucket's own out of one tensor for each leaf."""
        # Two statements, since Dynamo cannot trace := in a comprehension.
        own = [tensors[i] for i in self.index]
        return [t for t in own if t is not None]

    def only(self, positions: Sequence[int]) -> "Bucket":
        """The bucket with some of its leaves, by their position in it."""
        return replace(
            self,
            index=[self.index[j] for j in positions],
            names=[self.names[j] for j in positions],
            projections=[self.projections[j] for j in positions],
        )

    def own(self, hyperparams: Scalars) -> Scalars:
        """Out of a state's hyperparameters those of the algorithm."""
        return {name: hyperparams[join(self.key, name)] for name in self.algorithm.hyperparams}

    def scalars(self, count: Tensor, own: Scalars) -> Scalars:
        """The step's scalars, each cast once to what the lists are computed in."""
        wide = compute_dtype(self.dtype)
        # Copies: Dynamo guards that two inputs which are one tensor stay one.
        return {
            name: scalar.to(
                self.device, scalar.dtype if scalar.dtype is torch.bool else wide, copy=True
            )
            for name, scalar in self.algorithm.scalars(count, own).items()
        }

    def update(
        self, params: Tensors, grads: Tensors, slots: Slots, scalars: Scalars
    ) -> tuple[Tensors, Slots]:
        """The algorithm's update, computed wide and rounded once."""
        wide = compute_dtype(self.dtype)
        params, slots = self.algorithm.update(
            _cast(params, wide),
            _cast(grads, wide),
            {slot: _cast(values, wide) for slot, values in slots.items()},
            scalars,
            self.projections,
        )
        return _cast(params, self.dtype), {
            slot: _cast(values, self.dtype) for slot, values in slots.items()
        }


def join(key: str, name: str) -> str:
    """A name under a group's key; either may be empty."""
    return f"{key}.{name}" if key and name else key + name


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """A bucket in another dtype; the very same list if it has it already."""
    return tensors if tensors[0].dtype is dtype else [t.to(dtype) for t in tensors]
