"""The command as the tests run it, and what it wrote."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gcfunc._catalog import CATALOG
from gcfunc.recipes.cli import main

QUICK = ("--dataset", "digits", "--limit", "48", "--epochs", "2", "--batch-size", "16", "--eager")
STEPS = 6  # of one QUICK run
HOOKED = [name for name, algorithm in CATALOG.items() if algorithm.twin]

AfterStep = Callable[[int, Callable[[], None]], None]


def train(out: Path, *options: str) -> dict[str, Any]:
    """Run the command and give what it wrote."""
    assert main(["train", *options, "--out", str(out)]) == 0
    return results(out)


def results(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "run.json").read_text())
    return content


def weights(out: Path, run: str) -> dict[str, Tensor]:
    params: dict[str, Tensor] = torch.load(out / "weights" / f"{run}.pt", weights_only=True)
    return params


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def untimed(result: dict[str, Any]) -> Any:
    """The result without what no two runs share, times."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k != "step_ms"}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(result)


def command(*options: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gcfunc", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gcfunc: error: ")
    assert re.search(said, line)
