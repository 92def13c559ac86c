"""The figures of a GPU, within a time: steps beside torch's and others', and CUDA graphs.

The most important come first. What does not begin in time is shown as left out, and so is a peer
that is not ready by its own limit.

    python -m benchmarks.gpu --seconds 240
    python -m benchmarks.gpu --rehearse --models tiny_cnn --algorithms sgd
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.gpu import steps, training
from benchmarks.gpu.steps import Row
from benchmarks.harness import attempts, measure
from benchmarks.harness.shapes import MODELS
from benchmarks.peers.algorithms import COMPARED

SECONDS, EACH, LIMIT = 240.0, 0.5, 75.0
"""For all, for each comparison, for each peer with its compilation."""
FOR_TRAINING = 0.2
"""The share of the time that is kept for whole training steps."""


def main() -> str | None:
    """Measure, print, write; what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--algorithms", nargs="+", default=list(COMPARED), choices=COMPARED)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all")
    parser.add_argument("--each", type=float, default=EACH, help="for each comparison")
    parser.add_argument("--limit", type=float, default=LIMIT, help="for each peer")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, unwritten")
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        sys.exit(f"torch {torch.__version__} finds no GPU; --rehearse runs this on the CPU")
    device = "cpu" if args.rehearse else "cuda"
    end = time.monotonic() + args.seconds
    rows: list[Row] = []

    def add(row: Row, measured: Callable[[], Row], until: float) -> None:
        row = row | within(measured, min(args.limit, until - time.monotonic()))
        rows.append(row)
        if not args.rehearse:  # at once: whoever stops this may not wait for its end
            measure.write(path(), "gpu", rows, device)
        print(" | ".join(cells(row)), flush=True)

    for case in steps.cases(args.models, args.algorithms):
        shapes = steps.shapes_of(case.model, rehearse=args.rehearse)
        measured = partial(steps.measured, case, shapes, device, args.each)
        add(case._asdict(), measured, end - FOR_TRAINING * args.seconds)
    task = training.task_for(rehearse=args.rehearse)
    for candidate in training.CANDIDATES:
        measured = partial(training.measured, candidate, "sgd", task, device, args.each)
        named = {"model": "whole step, cnn", "algorithm": "sgd", "candidate": candidate}
        add(named, measured, end)
    print("\n" + measure.table([*HEAD], [cells(row) for row in rows]), flush=True)
    if failed := [r for r in rows if "error" in r and r["candidate"].startswith(OURS)]:
        return f"of gcfunc itself, {len(failed)} failed or were left out"
    return None


OURS = ("gcfunc", "train_step")


def within(measured: Callable[[], Row], seconds: float) -> Row:
    """A row's figures, or why there are none."""
    if seconds < 1:
        return {"error": "left out, as the time is spent"}
    try:
        with attempts.limit(seconds):
            return measured()
    except (Exception, attempts.TookTooLong) as error:
        return {"error": attempts.described(error)}
    finally:
        torch.compiler.reset()
        gc.collect()


def path() -> Path:
    """Where the figures of this device are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return measure.results(f"cuda-{name}")


HEAD: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "algorithm": lambda row: row["algorithm"],
    "step": lambda row: row["candidate"],
    "ratio": lambda row: f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
    "to": lambda row: row["against"],
    "time": lambda row: f"{1e3 * row['seconds']:.3f} ms",
    "host": lambda row: f"{1e3 * row['host']:.3f} ms" if "host" in row else "",
    "of a copy's bandwidth": lambda row: f"{row['share']:.0%}" if "share" in row else "",
    "launches": lambda row: str(row["launches"]),
    "graphs replayed, skipped": lambda row: (
        f"{row.get('replays', '?')}, {row['skips']}" if "skips" in row else ""
    ),
    "first step": lambda row: f"{row['first_step']:.1f} s",
}
"""The columns of the table, and what each says of a row."""


def cells(row: Row) -> list[str]:
    """A line of the table."""
    columns = [*HEAD.values()]
    if "error" in row:
        said = row["error"].replace("|", r"\|")
        return [*(say(row) for say in columns[:3]), said, *[""] * (len(columns) - 4)]
    return [say(row) for say in columns]


def leave(failure: str | None) -> NoReturn:
    """End now: torch would first wait, minutes, for compilations that were cut off."""
    print(failure or "", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(failure is not None)


if __name__ == "__main__":
    leave(main())
