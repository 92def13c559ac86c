"""Along which curves steps are measured: the shapes of the parameters at each point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.harness.shapes import Shapes
from benchmarks.peers import candidates
from benchmarks.peers.steps import Peer, fastest_torch

SHOWN = ("torch foreach + loop", "gcfunc packed", "gcfunc")
CANDIDATES: dict[str, Callable[..., Peer]] = {
    candidates.FUSED: fastest_torch,
    **{name: candidates.CANDIDATES[name] for name in SHOWN},
}
FORMS = {"gcfunc packed": "packed", "gcfunc": "unpacked"}
"""Those that are compiled, as benchmarks/peers/compile_time.py calls them."""


def alike(n: int, total: int = 4_000_000) -> Shapes:
    """Matrices of one shape, about square."""
    width = math.isqrt(total // n)
    return {f"layer{i}.weight": (total // n // width, width) for i in range(n)}


def different(n: int, total: int = 4_000_000) -> Shapes:
    """Matrices of about one size and no two of one width, so that packing gathers nothing."""
    size = total // n
    least = max(2, math.isqrt(size) - n // 2)
    return {f"layer{i}.weight": (max(1, size // (least + i)), least + i) for i in range(n)}


def wide(width: int) -> Shapes:
    """Four matrices of 2**22 parameters each."""
    return {f"layer{i}.weight": (2**22 // width, width) for i in range(4)}


class Line(NamedTuple):
    """A line of a curve.

    Attributes:
        shapes: At each point.
        points: Where steps are measured.
        compiled: Where compilation is.
        algorithm: What steps.
        candidates: Of ``CANDIDATES``.
    """

    shapes: Callable[[int], Shapes]
    points: Sequence[int]
    compiled: Sequence[int]
    algorithm: str = "sgd"
    candidates: Sequence[str] = tuple(CANDIDATES)


COUNTS = (10, 30, 100, 300, 1000, 2000)
SIZES = tuple(10**k for k in range(4, 10))
WIDTHS = tuple(4**k for k in range(11))
CURVES: dict[str, dict[str, Line]] = {
    "tensors": {
        "SGD, all of one shape": Line(alike, COUNTS, (10, 100, 1000, 2000)),
        "SGD, no two of one width": Line(
            different,
            COUNTS,
            (10, 100, 300, 1000, 2000),
            candidates=[c for c in CANDIDATES if c != "gcfunc packed"],
        ),
    },
    "parameters": {
        "SGD, 10 tensors": Line(partial(alike, 10), SIZES, (10**4, 10**8)),
        "AdamW, 10 tensors": Line(partial(alike, 10), SIZES, (), "adamw"),
    },
    "width": {"SGD, 4 tensors": Line(wide, WIDTHS, (1, 4**10))},
}
AXES = {
    "tensors": "number of tensors (4 million parameters)",
    "parameters": "number of parameters",
    "width": "row width (17 million parameters)",
    "processes": "processes of one thread, on {cores} cores",
}
