"""The steps of an optimizer that are measured, the most important first, and each one's figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu import launches
from benchmarks.harness import bandwidth, measure
from benchmarks.harness.shapes import MODELS, Shapes, tensors
from benchmarks.peers.candidates import CANDIDATES, FUSED
from benchmarks.peers.steps import Params, Peer, fastest_torch, foreach_torch

FOREACH, COMPILED = "torch foreach, no GC", "torch compiled, no GC"
PACKED, TREE = "gcfunc packed", "gcfunc"
MOST_USED = ("adamw", "sgd")

ORDER: tuple[tuple[Sequence[str], Sequence[str]], ...] = (
    (MOST_USED, (FUSED, PACKED, FOREACH)),
    (MOST_USED, (TREE,)),
    (MOST_USED, ("gcfunc drop-in", "gcfunc packed, no GC", "optimi, no GC")),
    (("adagrad",), (FUSED, PACKED, FOREACH, TREE, "gcfunc drop-in")),
    # The slowest to compile, of hundreds of tensors a minute and more.
    ((*MOST_USED, "adagrad"), (COMPILED,)),
)
IN_A_ROW = 10
"""Steps between two looks at the clock: a loop that trains does not wait for each one either."""

Row = dict[str, Any]


class Case(NamedTuple):
    """What is measured."""

    model: str
    algorithm: str
    candidate: str


def cases(models: Sequence[str], algorithms: Sequence[str]) -> Iterator[Case]:
    """All of them, in order."""
    for those, candidates in ORDER:
        for model in models:
            for algorithm in filter(algorithms.__contains__, those):
                for candidate in candidates:
                    yield Case(model, algorithm, candidate)


def shapes_of(model: str, *, rehearse: bool) -> Shapes:
    """A model's, or for rehearsal the ends of it, cut to size."""
    shapes = MODELS[model]()
    if not rehearse:
        return shapes
    names = [*shapes]
    return {n: tuple(min(size, 8) for size in shapes[n]) for n in (*names[:2], *names[-2:])}


def measured(case: Case, shapes: Shapes, device: str, seconds: float) -> Row:
    """Its figures, times in seconds for one step."""
    params, grads = tensors(shapes, device)
    against, baseline = fastest(case.algorithm, params, grads)
    started = time.perf_counter()
    step = made(case, params, grads).step
    step()
    now = measure.clock(device)
    now()  # waits for the device
    row: Row = {"first_step": time.perf_counter() - started, "against": against}
    row |= measure.against(in_a_row(step), in_a_row(baseline.step), device, seconds)._asdict()
    for time_of in ("seconds", "baseline"):
        row[time_of] /= IN_A_ROW
    row["host"] = statistics.median(host(step, now) for _ in range(7))
    # A step moves the same bytes whoever makes it.
    bytes_a_second = bandwidth_of_a_copy(bandwidth.held(case.algorithm, shapes), device)
    row["copy"] = bytes_a_second
    row["share"] = bandwidth.moved(case.algorithm, shapes) / row["seconds"] / bytes_a_second
    return row | launches.of(step, device)


def fastest(algorithm: str, params: Params, grads: Params) -> tuple[str, Peer]:
    """Torch's fused step, or foreach where this torch has none for this device; both without GC."""
    try:
        peer = fastest_torch(algorithm, params, grads)
        peer.step()
    except (NotImplementedError, RuntimeError):
        return FOREACH, foreach_torch(algorithm, params, grads)
    return FUSED, peer


def made(case: Case, params: Params, grads: Params) -> Peer:
    """The peer of a case."""
    if case.candidate == FUSED:  # which tells by how much a step differs from itself
        return fastest_torch(case.algorithm, params, grads)
    return CANDIDATES[case.candidate](case.algorithm, params, grads)


def in_a_row(step: Callable[[], object]) -> Callable[[], None]:
    """Many steps as one."""

    def steps() -> None:
        for _ in range(IN_A_ROW):
            step()

    return steps


def host(step: Callable[[], object], wait: Callable[[], object]) -> float:
    """Seconds after which a step gives control back, the device still at work."""
    wait()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def bandwidth_of_a_copy(size: int, device: str) -> float:
    """Bytes a second of a copy that touches as much memory."""
    copy = bandwidth.copy(size, device)
    steps = in_a_row(copy.call)
    steps()
    each = statistics.median(measure.seconds(steps, device) for _ in range(7)) / IN_A_ROW
    return copy.moved / each
