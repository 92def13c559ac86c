"""One compiled graph, and what torch.compile is told for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch

from gcfunc._compiled.threads import Dispatched
from gcfunc._rows import fit
from gcfunc._step.bucket import Bucket
from gcfunc._tensors import compiling
from gcfunc._tensors.versions import COUNTS_RECOMPILES_TOGETHER

P = ParamSpec("P")
R = TypeVar("R")

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


def compile_options(given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for :func:`torch.compile`: ours, and those that a user gave."""
    kwargs = {"fullgraph": True, **given}
    if kwargs.get("backend", "inductor") == "inductor":
        # torch.compile takes either a mode or options.
        mode = torch._inductor.list_mode_options(kwargs.pop("mode", None) or "default")
        known = {*torch._inductor.list_options()}  # it refuses what this version does not have
        ours = {option: value for option, value in INDUCTOR_OPTIONS.items() if option in known}
        kwargs["options"] = ours | mode | (kwargs.get("options") or {})
    return kwargs


def compile_apart(function: Callable[P, R], kwargs: dict[str, Any]) -> Callable[P, R]:
    """``torch.compile(function, **kwargs)``, whose compilations are counted by themselves.

    torch.compile counts them by piece of source, whichever function it was called with, and refuses
    the ninth. Every model's graph is made from one piece of ours, so the ninth model would be
    refused.
    """
    if COUNTS_RECOMPILES_TOGETHER:
        function = _with_own_code(function)
    else:
        kwargs = {"isolate_recompiles": True, **kwargs}
    return torch.compile(function, **kwargs)


def _with_own_code(function: Any) -> Any:
    """The same function or method with a copy of its code object, by which Dynamo counts."""
    plain = getattr(function, "__func__", function)
    copy = FunctionType(
        plain.__code__.replace(),
        plain.__globals__,
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    return copy if plain is function else MethodType(copy, function.__self__)


MOST_COMPILATIONS = 32
"""In how many steps an optimizer compiles; what none of them has compiled is stepped as it is."""


class Graph:
    """A function that updates in place, compiled for each layout that its gradients come in."""

    def __init__(
        self, function: Callable[..., Any], kwargs: dict[str, Any], *, ahead: bool
    ) -> None:
        if ahead:
            only = {"guard_filter_fn": _about_gradients}
            kwargs |= {"options": kwargs["options"] | only}
        self._compiled: Any = compile_apart(function, kwargs)
        self._called = Dispatched(self._compiled, kwargs)
        self._ahead = ahead
        self._may_compile = False
        self.variants: list[Any] = []

    def compiled_for(self, arguments: tuple[Any, ...], *, again: bool = False) -> Any:
        """The function compiled for such arguments, or ``None``; ``again`` if it was called so."""
        if not self._ahead:
            return self._called.again if again else self._called if self._may_compile else None
        return next((v for v in self.variants if v.guard_check(*arguments)), None)

    def compile_for(self, arguments: tuple[Any, ...]) -> Any:
        """The function compiled for such arguments, now if need be; nothing is written."""
        if not self._ahead:
            self._may_compile = True  # torch.compile traces it when it is called
        found = self.compiled_for(arguments)
        if found is None:
            with compiling.alone():
                found = self.compiled_for(arguments)  # another thread may have compiled it
                if found is None:
                    found = self._compiled.aot_compile((arguments, {}))
                    found.disable_guard_check()  # just done, and a third of the price of a call
                    self.variants.append(found)
        return found


class Graphs(dict[Any, Graph]):
    """Compiled graphs by what they are for, of which there is a bound.

    Torch never gives back all that a compilation took, so that graphs nobody needs any more cannot
    be exchanged for others.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self._most = self._left = MOST_COMPILATIONS if most is None else most

    def may_grow(self) -> bool:
        """Whether there may be more; says once that there may not."""
        if self._left == 0:
            self._left = -1
            warnings.warn(
                f"an optimizer compiles for {self._most} sets of shapes at most; steps of "
                "others are not compiled from here on. Keep tensors that grow at a padded "
                "capacity, give each model an optimizer of its own, or do not compile "
                "(compile=False)",
                stacklevel=2,
            )
        return self._left > 0

    def grew(self) -> None:
        """Note that a step had to compile."""
        self._left -= self._left > 0


def compiles_ahead(kwargs: dict[str, Any], buckets: Sequence[Bucket]) -> bool:
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
        and not any(fit.is_for(b.device) for b in buckets)
        # All processes must talk in one order, however their shards differ.
        and not any(p is not None and p.communicates for b in buckets for p in b.projections)
        and kwargs["fullgraph"]
        and not kwargs.get("disable")
        and not torch._inductor.config.force_disable_caches
        and hasattr(torch.compile(_about_gradients), "aot_compile")
    )


def is_captured(kwargs: dict[str, Any]) -> bool:
    """Whether Inductor is told to make CUDA graphs, as by ``mode="reduce-overhead"``."""
    return bool((kwargs.get("options") or {}).get("triton.cudagraphs"))


def takes_rows(kwargs: dict[str, Any]) -> bool:
    """Whether the row kernel may do what Inductor would."""
    return kwargs.get("backend", "inductor") == "inductor" and not kwargs.get("disable")


def _about_gradients(guards: Sequence[Any]) -> list[bool]:
    """Of Dynamo's guards, those on gradients and on global settings such as the threads."""
    kept = ["grads" in guard.name for guard in guards]
    if not any(kept):
        raise RuntimeError("torch.compile guards no gradient under its name")
    return [
        about or guard.guard_type == "GLOBAL_STATE"
        for about, guard in zip(kept, guards, strict=True)
    ]


def require_torch_compile() -> None:
    """Raise RuntimeError where torch.compile knows neither this Python nor this platform."""
    torch.compile(_about_gradients)
