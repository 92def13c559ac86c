"""Compiled training steps: forward, backward and update as one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcfunc import _tree
from gcfunc._optimizer import require_scalars
from gcfunc._plan import Differentiate, Plan
from gcfunc._types import require_state
from gcfunc.train_step import TrainState, TrainStep

CPU_OPTIONS: dict[str, Any] = {
    # Convolutions would give gradients in channels_last, whatever layout their weights have, and
    # updating one layout from another takes several times as long.
    "layout_optimization": False,
}
"""What Inductor is told besides, on the CPU."""


class CompiledTrainStep:
    """A training step whose pure ``step`` is compiled; :func:`gcfunc.compile` makes it."""

    def __init__(self, train_step: TrainStep, kwargs: dict[str, Any]) -> None:
        if "options" in kwargs and train_step.device_type == "cpu":
            kwargs = kwargs | {"options": CPU_OPTIONS | kwargs["options"]}
        self._train_step = train_step
        self._kwargs = kwargs
        self._step = torch.compile(train_step.step, **kwargs)

    def init(self) -> TrainState:
        """As ``init`` of :func:`gcfunc.train_step`."""
        return self._train_step.init()

    def step(self, train: TrainState, inputs: Any, *targets: Any) -> tuple[Any, ...]:
        """As ``step`` of :func:`gcfunc.train_step`."""
        return self._step(train, inputs, *targets)

    def __call__(self, train: TrainState, inputs: Any, *targets: Any) -> tuple[Any, ...]:
        """Short for :meth:`step`."""
        return self.step(train, inputs, *targets)

    def __repr__(self) -> str:
        return f"compile({self._train_step!r})"


class DonatedTrainStep(CompiledTrainStep):
    """A training step that updates in place; :func:`gcfunc.compile` makes it."""

    def __init__(self, train_step: TrainStep, kwargs: dict[str, Any]) -> None:
        super().__init__(train_step, kwargs)
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self._serving: tuple[Plan, Callable[..., Any]] | None = None

    @torch.no_grad()
    def step(self, train: TrainState, inputs: Any, *targets: Any) -> tuple[Any, ...]:
        """As ``step`` of :func:`gcfunc.train_step`, but ``train`` is updated in place.

        The :class:`TrainState` returned is the very one handed in. No autograd history is recorded.
        """
        self._train_step.require_own(train)
        require_state(train.state)
        require_scalars(train.state)
        plan, graph = self._planned(train)
        count = train.state.step + 1
        # As vectors: Inductor loses in-place writes to 0-d float64 tensors on the CPU.
        buffers = {n: b if b.ndim else b.view(1) for n, b in train.buffers.items()}
        try:
            [(params, _, slots, scalars)] = plan.arguments(
                [None] * len(train.params), count, train.state
            )
            results = graph(params, slots, scalars, buffers, inputs, targets)
        except Exception:
            # A trace that failed says so in torch's words; if it was the user's input, in ours.
            self._train_step.opt.prepare(train.params, train.params, train.state)
            self._train_step.gradients(train.params, train.buffers, inputs, targets)
            raise
        train.state.step.copy_(count)
        return train, *results

    def _planned(self, train: TrainState) -> tuple[Plan, Callable[..., Any]]:
        flat = _tree.flatten(train.params, "params")
        buffers = train.buffers.values()
        serving = self._serving  # read once: another thread may step another model
        if serving is None or not serving[0].serves(flat, flat.leaves, train.state, buffers):
            # Gradients are like their parameters, and none is missing.
            _, gs, buckets = self._train_step.opt.prepare(train.params, train.params, train.state)
            plan = Plan(buckets, flat, gs, train.state, split=False, besides=buffers)
            [part] = plan.parts
            # The graph finds tensors by name, and its buffers' shapes are constants in it.
            named = [(name, b.shape) for name, b in train.buffers.items()]
            key = part.key, *flat.names, *named
            if key not in self._graphs:
                step = part.update_after(_differentiate(self._train_step, train.buffers))
                self._graphs[key] = torch.compile(step, **self._kwargs)
            serving = self._serving = plan, self._graphs[key]
        return serving


def _differentiate(train_step: TrainStep, like: dict[str, Tensor]) -> Differentiate:
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
