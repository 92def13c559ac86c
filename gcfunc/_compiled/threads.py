"""One thread compiles at a time; steps that are compiled already wait for none.

torch.compile works on what all threads share, such as the patches of ``nn.Module`` under which a
graph is traced, and guards only a part of it:

- Dynamo compiles one frame at a time, under a lock. ``aot_compile`` does not take that lock, and
  dies where two threads are in it: https://github.com/pytorch/pytorch/issues/168042.
- Threads that miss a graph at the same time each compile it, one after the other, and each counts
  towards the limit of compilations, past which ``fullgraph=True`` is an error.
- Below torch 2.14, calls of compiled functions are refused while another thread traces:
  https://github.com/pytorch/pytorch/issues/126024.

So all compilations of ours have a lock, and where a call may compile is found out here first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from gcfunc._tensors import compiling, trees
from gcfunc._tensors.versions import CONFIGURES_THREADS_TOGETHER, TRACES_THREADS_TOGETHER

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE = 60.0
"""For how many seconds a call waits for another, lest a graph be compiled twice."""
MOST_KNOWN = 1024


class Dispatched(Generic[P, R]):
    """What ``torch.compile(..., **kwargs)`` made, for several threads to call.

    Only Dynamo knows whether a call has to compile. One that meets no other goes ahead. One that
    does waits for it, unless a call with such arguments has ended before, and so is compiled.
    """

    def __init__(self, function: Callable[P, R], kwargs: dict[str, Any]) -> None:
        self._function = function
        self._always_waits = CONFIGURES_THREADS_TOGETHER and kwargs.get("dynamic") is not None
        self._known: set[Hashable] = set()

    def __call__(self, *args: P.args, **named: P.kwargs) -> R:
        """Call it."""
        if torch.compiler.is_dynamo_compiling():
            return self._function(*args, **named)
        alone = compiling.lock.acquire(blocking=False)
        try:
            if alone and threading.active_count() == 1:
                return _patiently(self._function, *args, **named)
            like = _signature([args, named])
            if not alone and (self._always_waits or like not in self._known):
                alone = compiling.lock.acquire(timeout=PATIENCE)
            result = _patiently(self._function, *args, **named)
        finally:
            if alone:
                compiling.lock.release()
        if len(self._known) < MOST_KNOWN:
            self._known.add(like)
        return result

    def again(self, *args: P.args, **named: P.kwargs) -> R:
        """Call it with arguments like those of a call that has ended, as the caller knows.

        Nothing is asked of the arguments, which costs more than it takes to launch a step.
        """
        if self._always_waits:
            return self(*args, **named)
        return _patiently(self._function, *args, **named)


def _patiently(function: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
    """Call a compiled function, after other threads' compilations if torch wants it so."""
    try:
        return function(*args, **named)
    except RuntimeError as error:
        # Raised before anything ran.
        if not TRACES_THREADS_TOGETHER or "using FX to symbolically trace" not in str(error):
            raise
    with compiling.alone():
        return function(*args, **named)


def _signature(tree: Any) -> Hashable:
    """What arguments have in common that need no other compilation, in most cases."""
    leaves = [
        (t.shape, t.stride(), t.dtype, t.requires_grad) if isinstance(t, Tensor) else type(t)
        for t in trees.leaves_of(tree)
    ]
    return torch.is_grad_enabled(), torch.get_num_threads(), *leaves
