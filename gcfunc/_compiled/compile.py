"""``gcfunc.compile``: steps compiled, in place where params and state are given up."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from gcfunc._compiled.graph import compile_apart, compile_options, takes_rows
from gcfunc._compiled.planned import Planned
from gcfunc._compiled.row_graph import PureRows
from gcfunc._compiled.threads import Dispatched
from gcfunc._compiled.train_step import CompiledTrainStep, DonatedTrainStep
from gcfunc._step import history
from gcfunc._step.optimizer import Optimizer
from gcfunc._step.state import State, require_scalars, require_state
from gcfunc._tensors import trees
from gcfunc._tensors.trees import Tree
from gcfunc._training.step import TrainStep


@overload
def compile(  # noqa: A001
    opt: Optimizer, *, donate: Literal[True] = True, **torch_compile_kwargs: Any
) -> Donated: ...


@overload
def compile(  # noqa: A001
    opt: Optimizer, *, donate: bool, **torch_compile_kwargs: Any
) -> Compiled: ...


@overload
def compile(  # noqa: A001
    opt: TrainStep, *, donate: bool = True, **torch_compile_kwargs: Any
) -> CompiledTrainStep: ...


def compile(  # noqa: A001
    opt: Optimizer | TrainStep, *, donate: bool = True, **torch_compile_kwargs: Any
) -> Compiled | CompiledTrainStep:
    """An optimizer whose step is compiled by :func:`torch.compile`, without graph breaks.

    A step is one graph. Donated, and on the CPU, a large model's is several, those for repeated
    layers compiled once: there the time to compile goes by the number of tensors, see also
    :func:`gcfunc.pack`. On CUDA it is a few launches of one Triton kernel for all tensors, which is
    compiled in seconds; donated, those need no graph.

    Args:
        opt: Any optimizer of this library, or a whole :func:`gcfunc.train_step`.
        donate: ``True``: ``step`` updates the params and the state it is handed in place and
            returns them, as torch.optim does. ``False``: ``step`` stays pure. A training step's
            buffers are treated like its params.
        torch_compile_kwargs: For :func:`torch.compile`, such as ``mode`` or ``options``.
            ``fullgraph=True`` is set already, and a few of Inductor's options are; yours win. A
            donated step always compiles for fixed sizes.

    Returns:
        An object with the same ``init`` and ``step``. A changed hyperparameter does not compile
        again. Params of other shapes do, and so does another pattern of missing gradients or
        another layout of them. A donated step compiles in 32 steps at most; for what those have
        not compiled it warns once and goes on uncompiled, in place. A pure step makes symbols of
        sizes that change, and is an error past torch's limit of 8 graphs; a training step is so
        for its inputs. A donated step keeps the tensors of its latest call alive.

    Note:
        Threads may step at the same time, one function or several. One compiles at a time, and
        steps that are compiled do not wait for it (below torch 2.14 some do). Of a
        ``torch.compile`` of your own, torch makes as many graphs as threads enter it first: call
        it once before they start.

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
    if not isinstance(opt, Optimizer | TrainStep):
        raise TypeError(
            f"opt must be an optimizer such as gcfunc.sgd(0.1), or a train_step, got {opt!r}"
        )
    kwargs = compile_options(torch_compile_kwargs)
    if isinstance(opt, TrainStep):
        return DonatedTrainStep(opt, kwargs) if donate else CompiledTrainStep(opt, kwargs)
    return Donated(opt, kwargs) if donate else Compiled(opt, kwargs)


class Compiled:
    """An optimizer whose pure ``step`` is compiled; :func:`gcfunc.compile` makes it."""

    def __init__(self, opt: Optimizer, kwargs: dict[str, Any]) -> None:
        self._opt = opt
        self._kwargs = kwargs
        self._rows = PureRows(opt, possible=takes_rows(kwargs))
        self._step = Dispatched(compile_apart(self._rows.step, kwargs), kwargs)

    def init(self, params: Tree) -> State:
        """As :meth:`gcfunc.Optimizer.init`."""
        self._rows.prepare()
        return self._opt.init(params)

    def step(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """As :meth:`gcfunc.Optimizer.step`."""
        self._rows.prepare()
        new, new_state = self._step(params, grads, state)
        history.follow_trees((params, grads, state), (new, new_state))
        return new, new_state

    def __repr__(self) -> str:
        return f"compile({self._opt!r})"


class Donated(Compiled):
    """An optimizer that steps in place; :func:`gcfunc.compile` makes it."""

    def __init__(self, opt: Optimizer, kwargs: dict[str, Any]) -> None:
        super().__init__(opt, kwargs)
        self.planned = Planned(opt, kwargs)

    @torch.no_grad()
    def init(self, params: Tree) -> State:
        """As :meth:`gcfunc.Optimizer.init`, but no autograd history is recorded."""
        return super().init(params)

    @torch.no_grad()
    def step(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """As :meth:`gcfunc.Optimizer.step`, but params and state are updated in place.

        The trees returned are the very ones handed in. No autograd history is recorded.
        """
        flat = trees.flatten(params, "params")
        gs = trees.leaves_like(grads, flat.names, "grads", "params", flat.layout)
        require_state(state)
        require_scalars(state)
        self.planned.step(flat, gs, state)
        return params, state
