"""Compiled training steps: forward, backward and update as one graph."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gcfunc._compiled.graph import Graph, Graphs, compile_apart
from gcfunc._compiled.planned import Planned
from gcfunc._compiled.substep import Differentiate, SubStep
from gcfunc._compiled.threads import Dispatched
from gcfunc._compiled.views import as_vector
from gcfunc._step import history
from gcfunc._step.bucket import Bucket
from gcfunc._step.state import require_scalars, require_state
from gcfunc._tensors import trees
from gcfunc._tensors.trees import FlatTree
from gcfunc._tensors.versions import LOSES_0D_FLOAT64
from gcfunc._training.step import TrainState, TrainStep

CPU_OPTIONS: dict[str, Any] = {
    # Convolutions would give gradients in channels_last, whatever layout their weights have, and
    # updating one layout from another takes several times as long.
    "layout_optimization": False,
}
"""What Inductor is told besides, on the CPU."""


class CompiledTrainStep:
    """A training step whose pure ``step`` is compiled; :func:`gcfunc.compile` makes it."""

    def __init__(self, train_step: TrainStep, kwargs: dict[str, Any]) -> None:
        train_step.require_compilable()
        if "options" in kwargs and train_step.device_type == "cpu":
            kwargs = kwargs | {"options": CPU_OPTIONS | kwargs["options"]}
        self._train_step = train_step
        self._kwargs = kwargs
        self._step = Dispatched(compile_apart(train_step.step, kwargs), kwargs)

    def init(self) -> TrainState:
        """As ``init`` of :func:`gcfunc.train_step`."""
        return self._train_step.init()

    def step(self, train: TrainState, inputs: Any, *targets: Any) -> tuple[Any, ...]:
        """As ``step`` of :func:`gcfunc.train_step`."""
        try:
            new, *results = self._step(train, inputs, *targets)
        except Exception as error:
            self._train_step.explain(error, train, inputs, targets)
            raise
        # Its gradients are made of its params, so that they require grad if these do.
        history.follow_trees((train.params, train.params, train.state), (new.params, new.state))
        return new, *results

    def __call__(self, train: TrainState, inputs: Any, *targets: Any) -> tuple[Any, ...]:
        """Short for :meth:`step`."""
        return self.step(train, inputs, *targets)

    def __repr__(self) -> str:
        return f"compile({self._train_step!r})"


class DonatedTrainStep(CompiledTrainStep):
    """A training step that updates in place; :func:`gcfunc.compile` makes it."""

    def __init__(self, train_step: TrainStep, kwargs: dict[str, Any]) -> None:
        super().__init__(train_step, kwargs)
        self._planned = _PlannedTraining(train_step, self._kwargs)

    @torch.no_grad()
    def step(self, train: TrainState, inputs: Any, *targets: Any) -> tuple[Any, ...]:
        """As ``step`` of :func:`gcfunc.train_step`, but ``train`` is updated in place.

        The :class:`TrainState` returned is the very one handed in. No autograd history is recorded.
        """
        self._train_step.require_own(train)
        require_state(train.state)
        require_scalars(train.state)
        return train, *self._planned.train(train, inputs, targets)


class _PlannedTraining(Planned):
    """Steps in place of which each makes its own gradients, and writes the buffers too."""

    _together = True

    def __init__(self, train_step: TrainStep, kwargs: dict[str, Any]) -> None:
        # A model keeps its shapes, and its inputs' are Dynamo's to count.
        super().__init__(train_step.opt, kwargs, Graphs(sys.maxsize))
        self._train_step = train_step

    def train(self, train: TrainState, inputs: Any, targets: Any) -> tuple[Any, ...]:
        """One step, and what it returns besides the next state."""
        flat = trees.flatten(train.params, "params")
        # Gradients are like their parameters, and none is missing.
        plan, graphs = self._plan_for(flat, flat.leaves, train.state, train.buffers)
        buffers = dict(train.buffers)
        if LOSES_0D_FLOAT64:
            lost = [n for n, b in buffers.items() if not b.ndim and b.dtype is torch.float64]
            buffers |= {name: as_vector(buffers[name]) for name in lost}
        made_inside = [None] * len(flat.leaves)
        try:
            [results] = self._call(plan, graphs, made_inside, train.state, buffers, inputs, targets)
        except Exception as error:
            self._train_step.explain(error, train, inputs, targets)
            raise
        own: tuple[Any, ...] = results
        return own

    def _compiles_ahead(self, buckets: Sequence[Bucket]) -> bool:
        return False

    def _graph_for(
        self, substep: SubStep, flat: FlatTree, besides: Mapping[str, Tensor], ahead: bool
    ) -> Graph:
        # The graph finds tensors by name, and its buffers' shapes are constants in it.
        key = substep.key, *flat.names, *((name, b.shape) for name, b in besides.items())
        if key not in self.graphs:
            step = substep.update_after(_differentiate(self._train_step, besides))
            self.graphs.setdefault(key, Graph(step, self._kwargs, ahead=ahead))
        return self.graphs[key]


def _differentiate(train_step: TrainStep, like: Mapping[str, Tensor]) -> Differentiate:
    """The step's gradients, the new buffers written over the old."""
    shapes = {name: b.shape for name, b in like.items()}

    def differentiate(
        params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Any, targets: Any
    ) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
        own = {name: b.view(shapes[name]) for name, b in buffers.items()}
        grads, new, results = train_step.gradients(params, own, inputs, targets)
        for name, b in own.items():
            if new[name].shape != b.shape:
                raise ValueError(f"the forward gave buffer {name!r} another shape")
            b.copy_(new[name])
        return grads, results

    return differentiate
