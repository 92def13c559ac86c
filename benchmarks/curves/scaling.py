"""How the time, the compilation and the memory of a step grow.

Along each curve one thing changes: the number of tensors, or the width of their rows, where the
number of parameters stays the same; the number of parameters; the number of processes, for hooks.
Every time, that of a copy too, takes turns with torch's fused step. What limit the copy sets is
explained in benchmarks/harness/bandwidth.py. Needs Linux, or CUDA, to know how much memory there
is.

    python -m benchmarks.curves.scaling --curves width --quantities time
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.curves import plots
from benchmarks.curves.lines import AXES, CURVES, FORMS
from benchmarks.curves.point import Point
from benchmarks.harness import measure, processes
from benchmarks.harness.footprint import available
from benchmarks.peers import hooks
from benchmarks.peers.candidates import FUSED

QUANTITIES = {
    "time": "median time of a step; ratios of medians to the first column",
    "compile": "first step beyond the second, cache cold, then warm",
    "memory": "peak of a step beyond what is held between steps",
}
POINT = "benchmarks.curves.point"
PATIENCE = 5
"""How many limits of one compilation all steps of a point may take together."""

UNHOOKED = "without hooks"
HOOKS = ["centralize_backward", "register_ddp"]
HOOKED = {"small CNN": "cnn", "MLP of width 512, batch of 64": "mlp"}
SIZES = (1, 2, 4)

Row = dict[str, Any]


class Along:
    """A line of a curve, point by point.

    A candidate that was too much for one point is not tried at those after it.
    """

    def __init__(self, curve: str, line: str, args: argparse.Namespace, seed: str) -> None:
        self._names = {"curve": curve, "line": line}
        self._line = CURVES[curve][line]
        self._args = args
        self._seed = seed
        self._over: dict[str, str] = {}

    def rows(self) -> Iterator[Row]:
        """What is found."""
        args, line = self._args, self._line
        for at in args.points or line.points:
            point = Point(line.algorithm, line.shapes(at), args.device, args.seconds)
            need, room = point.needs(turns=False) / 1e9, available(args.device) / 1e9
            if need > room:
                why = f"{need:,.1f} GB needed, {room:,.1f} GB available"
                self._over = dict.fromkeys(line.candidates, why)
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                shutil.copytree(self._seed, cache, dirs_exist_ok=True)
                if "compile" in args.quantities and (args.points or at in line.compiled):
                    yield from self._compilations(at, cache)
                if {"time", "memory"}.intersection(args.quantities):
                    yield from self._steps(at, cache)

    def _compilations(self, at: int, cache: str) -> Iterator[Row]:
        for candidate in self._line.candidates:
            if candidate not in FORMS:
                continue
            row = self._names | {"part": "compile", "at": at, "candidate": candidate}
            if candidate in self._over:
                yield row | {"skipped": self._over[candidate]}
                continue
            try:
                for start in ("cold", "warm"):
                    (found,) = self._ask("compile", at, [candidate], cache, self._args.limit)
                    row[start] = found["first_step"]
            except processes.UnfinishedError as error:
                self._over[candidate] = row["skipped"] = f"compiling {at:,} {error}"
                if error.late:
                    row["more_than"] = self._args.limit
            yield row

    def _steps(self, at: int, cache: str) -> Iterator[Row]:
        left = [candidate for candidate in self._line.candidates if candidate not in self._over]
        found: list[Row] = []
        why = ""
        if left:
            try:
                found = self._ask("steps", at, left, cache, PATIENCE * self._args.limit)
            except processes.UnfinishedError as error:
                found, why = error.printed, f"stepping {at:,} {error}"
        names = self._names | {"part": "steps", "at": at}
        yield from (names | row for row in found)
        for candidate in self._line.candidates:
            if candidate not in {row["candidate"] for row in found}:
                skipped = self._over.setdefault(candidate, why)
                yield names | {"candidate": candidate, "skipped": skipped}

    def _ask(
        self, what: str, at: int, candidates: Sequence[str], cache: str, limit: float
    ) -> list[Row]:
        args = self._args
        options = self._names | {"at": at, "seconds": args.seconds, "device": args.device}
        given = [f"--{name}={value}" for name, value in options.items()]
        own = (POINT, what, *given, "--candidates", *candidates)
        return processes.run(*own, cache=cache, limit=limit)


def with_hooks(line: str, sizes: Sequence[int], budget: float) -> Iterator[Row]:
    """Forward and backward in DDP."""
    for size in sizes:
        names = {"curve": "processes", "line": line, "part": "steps", "at": size}
        found = hooks.together(HOOKED[line], "eager", HOOKS, budget, size=size)
        baseline = statistics.median(row["baseline"] for row in found)
        yield names | {"candidate": UNHOOKED, "seconds": baseline, "ratio": 1.0}
        yield from (names | row for row in found)


def measured(curves: Sequence[str], args: argparse.Namespace, seed: str) -> Iterator[Row]:
    """All rows."""
    for curve in curves:
        if curve != "processes":
            for line in CURVES[curve]:
                yield from Along(curve, line, args, seed).rows()
        elif "time" in args.quantities:
            for line in HOOKED:
                yield from with_hooks(line, args.points or SIZES, args.seconds)


def markdown(rows: Sequence[Row], quantities: Sequence[str]) -> str:
    """A table for each curve and quantity."""
    tables = []
    for curve in dict.fromkeys(row["curve"] for row in rows):
        for quantity in quantities:
            part = "compile" if quantity == "compile" else "steps"
            own = [row for row in rows if (row["curve"], row["part"]) == (curve, part)]
            if quantity == "memory":
                own = [row for row in own if "beyond" in row or "skipped" in row]
            if not own:
                continue
            head = list(dict.fromkeys(row["candidate"] for row in own))
            lines: dict[tuple[str, int], list[object]] = {}
            for row in own:
                key = row["line"], row["at"]
                lines.setdefault(key, [row["line"], f"{row['at']:,}", *[""] * len(head)])
                lines[key][2 + head.index(row["candidate"])] = cell(row, quantity)
            table = measure.table(["", axis(curve), *head], list(lines.values()))
            tables.append(f"{QUANTITIES[quantity]}:\n\n{table}\n")
    return "\n".join(tables)


def axis(curve: str) -> str:
    """What changes along a curve."""
    return AXES[curve].format(cores=measure.machine()["cores"])


def cell(row: Row, quantity: str) -> str:
    """What a table says."""
    if "skipped" in row:
        return str(row["skipped"])
    if quantity == "compile":
        return f"{row['cold']:.1f} s, {row['warm']:.1f} s"
    if quantity == "memory":
        return f"{row['beyond'] / 1e6:.2f} MB"
    if row["candidate"] in (FUSED, UNHOOKED):
        return f"{1e3 * row['seconds']:.3f} ms"
    speed = f" ({row['bandwidth'] / 1e9:.0f} GB/s)" if "bandwidth" in row else ""
    return f"{row['ratio']:.2f}{speed}" + " (not in turns)" * (not row.get("turns", True))


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curves", nargs="+", choices=AXES)
    parser.add_argument("--quantities", nargs="+", default=list(QUANTITIES), choices=QUANTITIES)
    parser.add_argument("--points", nargs="+", type=int, help="instead of each curve's own")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each time")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds to compile one step")
    parser.add_argument("--device", default=measure.device())
    parser.add_argument("--output", default="scaling", help="another name for the results")
    args = parser.parse_args()
    if args.device != "cpu" and "processes" in (args.curves or ()):
        parser.error("the curve of processes, which talk through gloo, is of the CPU")
    # gloo's processes, and so the hooks here, are on the CPU.
    curves = args.curves or [c for c in AXES if c != "processes" or args.device == "cpu"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as seed:
        if curves != ["processes"]:
            # Into an empty cache anything at all takes ten seconds to compile.
            processes.run(POINT, "trivial", f"--device={args.device}", cache=seed)
        for row in measured(curves, args, seed):
            rows.append(row)
            print(json.dumps(row), flush=True)
    table = markdown(rows, args.quantities)
    measure.report("curves.scaling", table, rows, args.device, args.output)
    kind = "" if args.device == "cpu" else f"-{args.device}"
    for curve in curves:
        own = [row for row in rows if row["curve"] == curve]
        plots.draw(measure.RESULTS / f"{args.output}_{curve}{kind}.png", axis(curve), own)


if __name__ == "__main__":
    main()
