"""All that the gates read of gcfunc and torch by private names, there being no public ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.utils import counters
from torch._inductor import compile_fx, metrics
from torch._inductor.utils import clear_caches

from gcfunc._compiled.compile import Donated
from gcfunc.optim.base import DropIn


def held(stepper: object) -> int:
    """Pieces of compiled code that a donated step or a ``gcfunc.optim`` class dispatches itself."""
    graphs: list[Any] = []
    if isinstance(stepper, Donated):
        graphs = [*stepper.planned.graphs.values()]
    elif isinstance(stepper, DropIn):
        graphs = [graph for _, own in stepper._functionals.values() for graph in own.values()]
    return sum(len(graph.variants) for graph in graphs)


class Compiled(NamedTuple):
    """What Dynamo and Inductor made."""

    graphs: int
    graph_breaks: int
    cache_entries: int
    kernels: int
    bytes: int


@contextmanager
def compiling() -> Iterator[Callable[[], Compiled]]:
    """Begin with nothing compiled; the function yielded says what has been since."""

    def compiled() -> Compiled:
        codes = [code() for code in convert_frame.input_codes.seen]
        return Compiled(
            counters["stats"]["unique_graphs"],
            sum(counters["graph_break"].values()),
            sum(len(eval_frame._debug_get_cache_entry_list(code)) for code in codes if code),
            metrics.generated_kernel_count,
            metrics.num_bytes_accessed,
        )

    torch.compiler.reset()
    counters.clear()
    metrics.reset()
    # Bytes are added up for this log only, and a cached graph may have been compiled without it.
    log = logging.Logger("bytes", logging.INFO)
    with (
        mock.patch.object(compile_fx, "inductor_metrics_log", log),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        try:
            yield compiled
        finally:
            torch.compiler.reset()


def forget() -> None:
    """Compile as a new process would: ``reset`` alone keeps the code that Inductor has loaded."""
    torch.compiler.reset()
    clear_caches()


def profiled(call: Callable[[], object]) -> list[tuple[str, int]]:
    """Names and sizes of what happened, a size being that of memory that was taken or given back.

    The public ones add sizes up by operator.
    """
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        call()
    results: Any = profile.profiler
    return [(event.name(), event.nbytes()) for event in results.kineto_results.events()]
