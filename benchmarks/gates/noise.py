"""Whether the suite's margins hold for code that did not change: it is run again and again.

    python -m benchmarks.gates.noise -k "resnet50 and adamw"

Prints for each case its ratios, and the largest to the least of them, and of the shortest times,
which are what is compared with saved runs. Neither may be more than the margin.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gates.budgets import MARGIN
from benchmarks.harness import measure

ROOT = Path(__file__).parents[2]
GATES = "benchmarks/gates"
SUITE = [sys.executable, "-m", "pytest", "-c", f"{GATES}/pytest.ini", f"{GATES}/test_ratios.py"]
SAMPLE = (
    "(test_step and (resnet50-adamw or resnet50-radam) and gc]) "
    "or (test_step and tiny_cnn-sgd- and gc]) "
    "or (test_packed_step and tiny_cnn) or (test_pack and tiny_cnn) or (test_hooks and eager)"
)


class Found(NamedTuple):
    """A case in one run: its ratio, and its shortest time in seconds."""

    ratio: float
    least: float


def run(select: str, device: str) -> dict[str, Found]:
    """Each case in one run of the suite, none of which is judged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        own = ["--ungated", f"--device={device}", f"--benchmark-json={path}", "--benchmark-quiet"]
        done = suite("-k", select, *own)
        if done.returncode:
            raise RuntimeError(f"the suite ended with {done.returncode}:\n{done.stdout}")
        benchmarks = json.loads(path.read_text())["benchmarks"]
    return {
        b["extra_info"]["case"]: Found(b["extra_info"]["ratio"], b["stats"]["min"])
        for b in benchmarks
    }


def suite(*options: str) -> subprocess.CompletedProcess[str]:
    """The suite as a command."""
    # Within a run of pytest-xdist, pytest-benchmark would take this for one of its workers.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    out, err = subprocess.PIPE, subprocess.STDOUT
    return subprocess.run([*SUITE, *options], cwd=ROOT, env=env, text=True, stdout=out, stderr=err)


def spread(values: Sequence[float]) -> float:
    """The largest to the least."""
    return max(values) / min(values)


def main() -> None:
    """Repeat, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", dest="select", default=SAMPLE, help="cases, as pytest takes them")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default=measure.device())
    parser.add_argument("--output", help="another name for the file of results")
    args = parser.parse_args()
    found = [run(args.select, args.device) for _ in range(args.repetitions)]
    rows: list[dict[str, Any]] = []
    lines: list[list[object]] = []
    for case in found[0]:
        ratios, least = zip(*(each[case] for each in found), strict=True)
        spreads = {"spread": spread(ratios), "spread_of_least": spread(least)}
        rows.append({"case": case, "ratios": ratios, "least": least} | spreads)
        texts = [f"{value:.2f}" for value in (*ratios, *spreads.values())]
        lines.append([case, *texts])
    runs = [f"run {i}" for i in range(1, args.repetitions + 1)]
    head = ["case", *runs, "largest to least", "... of the shortest times"]
    measure.report("gates.noise", measure.table(head, lines), rows, args.device, args.output)
    over = [row["case"] for row in rows if max(row["spread"], row["spread_of_least"]) > MARGIN]
    if over:
        sys.exit(f"outside the margin of {MARGIN}: {', '.join(over)}")


if __name__ == "__main__":
    main()
