"""Compiled stepping: all arithmetic on params in graphs, in place where they are given up."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from gcfunc import _tree
from gcfunc._check import require_tensors
from gcfunc._compiled_train_step import CompiledTrainStep, DonatedTrainStep
from gcfunc._optimizer import Bucket, Optimizer, require_scalars
from gcfunc._plan import Arguments, Plan, Update
from gcfunc._tree import Tree
from gcfunc._types import State, require_state
from gcfunc.centralize import Sharded
from gcfunc.train_step import TrainStep

INDUCTOR_OPTIONS: dict[str, Any] = {
    # By default Inductor writes the moments to memory and reads them again for the parameter, as
    # the 0-d scalars they are made of count as reads.
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 256,
    # Likewise after many reads: Lookahead would write its fast weights, AdamW a part of its update.
    "realize_acc_reads_threshold": 64,
    # A product and a sum rounded once, as in torch's own kernels: fewer instructions.
    "cpp.enable_floating_point_contract_flag": "fast",
    # The plan and Dynamo's guards have just checked the same sizes and strides.
    "size_asserts": False,
}
"""What :func:`compile` tells Inductor, for its own graphs alone."""


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
    :func:`gcfunc.pack`.

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
        another layout of them: once each if donated, and up to torch's limit of 8 if not. A donated
        step keeps the tensors of its latest call alive.

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
    kwargs = {"fullgraph": True, **torch_compile_kwargs}
    if kwargs.get("backend", "inductor") == "inductor":
        # torch.compile takes either a mode or options.
        mode = torch._inductor.list_mode_options(kwargs.pop("mode", None) or "default")
        known = {*torch._inductor.list_options()}  # it refuses what this version does not have
        ours = {option: value for option, value in INDUCTOR_OPTIONS.items() if option in known}
        kwargs["options"] = ours | mode | (kwargs.get("options") or {})
    # All functions compiled from one piece of source share a limit of 8 compilations unless told
    # otherwise, which torch can be since 2.13.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        kwargs.setdefault("isolate_recompiles", True)
    if isinstance(opt, TrainStep):
        return DonatedTrainStep(opt, kwargs) if donate else CompiledTrainStep(opt, kwargs)
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
        self.graphs: dict[Any, _Graph] = {}  # by the key of a plan's part
        self._serving: tuple[Plan, list[_Graph]] | None = None

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
        require_scalars(state)
        self.step_flat(flat, gs, state)
        return params, state

    def step_flat(self, flat: _tree.Flat, gs: Sequence[torch.Tensor | None], state: State) -> None:
        """:meth:`step` on trees that were taken apart, under :func:`torch.no_grad`."""
        serving = self._serving  # read once: another thread may step another model
        if serving is None or not serving[0].serves(flat, gs, state):
            require_tensors(flat.names, flat.leaves, "params")
            buckets = self._opt.buckets(flat, gs, state)
            ahead = _compiles_ahead(self._kwargs, buckets)
            plan = Plan(buckets, flat, gs, state, split=ahead)
            for part in plan.parts:
                if part.key not in self.graphs:
                    self.graphs[part.key] = _Graph(part.update(), self._kwargs, ahead=ahead)
            serving = self._serving = plan, [self.graphs[part.key] for part in plan.parts]
        plan, graphs = serving
        count = state.step + 1
        try:
            arguments = plan.arguments(gs, count, state)
            # All are compiled before the first one writes.
            calls = [graph.ready(args) for graph, args in zip(graphs, arguments, strict=True)]
            for call, args in zip(calls, arguments, strict=True):
                call(*args)
        except Exception:
            # A trace that failed says so in torch's words; if it was the user's input, in ours.
            self._opt.buckets(flat, gs, state)
            raise
        state.step.copy_(count)


class _Graph:
    """An update in place, compiled for each layout that its gradients come in."""

    def __init__(self, update: Update, kwargs: dict[str, Any], *, ahead: bool) -> None:
        # Dynamo would take a second model's sizes for the first one's changing.
        kwargs = kwargs | {"dynamic": False}
        if ahead:
            only = {"guard_filter_fn": _about_gradients}
            kwargs |= {"options": kwargs["options"] | only}
        self._compiled: Any = torch.compile(update, **kwargs)
        self._ahead = ahead
        self._variants: list[Any] = []

    def ready(self, arguments: Arguments) -> Any:
        """The update compiled for such arguments; nothing is written."""
        if not self._ahead:
            return self._compiled  # traces when it is called
        for variant in self._variants:
            if variant.guard_check(*arguments):
                return variant
        variant = self._compiled.aot_compile((arguments, {}))
        variant.disable_guard_check()  # just done, and a third of the price of a call
        self._variants.append(variant)
        return variant


def _compiles_ahead(kwargs: dict[str, Any], buckets: Sequence[Bucket]) -> bool:
    """Whether to call what Inductor made directly, without Dynamo's dispatch.

    That is less than half the price for hundreds of tensors: a plan has checked params and state
    already. Measured and tested on the CPU. Not for float64, where Dynamo takes 0-d tensors for
    Python numbers, then starts anew, which ``aot_compile`` cannot.
    """
    options = kwargs.get("options") or {}
    return (
        kwargs.get("backend", "inductor") == "inductor"
        and not {"triton.cudagraphs", "guard_filter_fn"} & {k for k, v in options.items() if v}
        and all(b.device.type == "cpu" and b.dtype is not torch.float64 for b in buckets)
        # All processes must talk in one order, however their parts differ.
        and not any(isinstance(unit, Sharded) for b in buckets for unit in b.units)
        and kwargs["fullgraph"]
        and not kwargs.get("disable")
        and not torch._inductor.config.force_disable_caches
        and hasattr(torch.compile(_about_gradients), "aot_compile")
    )


def _about_gradients(guards: Sequence[Any]) -> list[bool]:
    """Of Dynamo's guards, those on gradients and on global settings such as the threads."""
    kept = ["grads" in guard.name for guard in guards]
    if not any(kept):
        raise RuntimeError("torch.compile guards no gradient under its name")
    return [
        about or guard.guard_type == "GLOBAL_STATE"
        for about, guard in zip(kept, guards, strict=True)
    ]
