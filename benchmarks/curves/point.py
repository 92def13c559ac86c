"""What scaling.py measures at one point of a curve, in a process of its own.

It prints rows of JSON, each as soon as it is known.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.curves.lines import CANDIDATES, CURVES, FORMS
from benchmarks.harness import bandwidth, measure
from benchmarks.harness.footprint import available, beyond
from benchmarks.harness.shapes import Shapes, tensors
from benchmarks.peers import compile_time
from benchmarks.peers.candidates import FUSED

LIMIT = "bandwidth limit"
ROUNDS = 5
"""How often each step is timed where memory does not suffice for two that take turns."""

Row = dict[str, Any]
Step = Callable[[], object]


class Point(NamedTuple):
    """What is stepped, where and for how long."""

    algorithm: str
    shapes: Shapes
    device: str
    seconds: float

    @property
    def held(self) -> int:
        """Bytes of params, gradients and slots."""
        return bandwidth.held(self.algorithm, self.shapes)

    def needs(self, *, turns: bool) -> int:
        """Bytes for torch's fused step and another that take ``turns``, or for the other alone.

        Those are included that are free again once the steps are made.
        """
        spare = 2 * bandwidth.FLOAT32 * bandwidth.elements(self.shapes)
        return (self.held + spare) * (2 if turns else 1)

    def step(self, candidate: str, params: Any, grads: Any) -> Step:
        """A candidate's."""
        return CANDIDATES[candidate](self.algorithm, params, grads).step

    def limit(self, copied: int, found: measure.Ratio) -> Row:
        """What the time of a copy says about steps."""
        moved = bandwidth.moved(self.algorithm, self.shapes)
        return {
            "candidate": LIMIT,
            "seconds": found.seconds * moved / copied,
            "ratio": found.ratio * moved / copied,
            "moved": moved,
            "bandwidth": copied / found.seconds,
        }

    def row(self, candidate: str, step: Step, found: measure.Ratio) -> Row:
        """Of a candidate that has been timed, with the memory that its step takes."""
        extra = statistics.median(beyond(step, self.device) for _ in range(3))
        return {"candidate": candidate} | found._asdict() | {"held": self.held, "beyond": extra}


def taking_turns(point: Point, candidates: Sequence[str]) -> Iterator[Row]:
    """Every candidate, and a copy, in turn with torch's fused step."""
    params, grads = tensors(point.shapes, point.device)
    against = partial(measure.against, device=point.device, budget=point.seconds)
    fused = point.step(FUSED, params, grads)
    copy = bandwidth.copy(point.held, point.device)
    found = against(copy.call, fused)
    yield point.row(FUSED, fused, measure.ratio([found.baseline], [found.baseline]))
    yield point.limit(copy.moved, found)
    del copy
    for candidate in candidates:
        if candidate != FUSED:
            step = point.step(candidate, params, grads)
            yield point.row(candidate, step, against(step, fused))
            del step
            clear()


def one_by_one(point: Point, candidates: Sequence[str]) -> Iterator[Row]:
    """The same where memory does not suffice for that: times lie further apart."""

    def times(step: Step) -> list[float]:
        return [measure.seconds(step, point.device) for _ in range(2 + ROUNDS)][2:]

    copy = bandwidth.copy(point.held, point.device)
    copied, moved = times(copy.call), copy.moved
    del copy
    baseline: list[float] = []
    for candidate in candidates:
        step = point.step(candidate, *tensors(point.shapes, point.device))
        clear()
        own = times(step)
        baseline = baseline or own
        yield point.row(candidate, step, measure.ratio(own, baseline)) | {"turns": False}
        if candidate == FUSED:
            yield point.limit(moved, measure.ratio(copied, own)) | {"turns": False}
        del step


def clear() -> None:
    """Drop what was compiled, and what it holds."""
    torch.compiler.reset()
    gc.collect()


def main() -> None:
    """Measure one point, print rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["steps", "compile", "trivial"])
    parser.add_argument("--curve", choices=CURVES)
    parser.add_argument("--line")
    parser.add_argument("--at", type=int)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args()
    if args.what == "trivial":
        print(json.dumps({"trivial": compile_time.trivial(args.device)}))
        return
    line = CURVES[args.curve][args.line]
    point = Point(line.algorithm, line.shapes(args.at), args.device, args.seconds)
    if args.what == "compile":
        (candidate,) = args.candidates
        form = FORMS[candidate]
        print(json.dumps(compile_time.first_step(point.shapes, line.algorithm, form, args.device)))
        return
    turns = point.needs(turns=True) <= available(args.device)
    measured = taking_turns if turns else one_by_one
    for row in measured(point, args.candidates):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
