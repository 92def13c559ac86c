"""Tests in processes of their own.

Triton's functions are made either to be interpreted or to be compiled, once for a process, and a
device that is not there should not be seen by other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cuda import interpret

HERE = Path(__file__).parent


def require_passes(switch: str, why_not: str | None, *arguments: str) -> None:
    """Tests pass in a process where Triton is told to interpret, or not to."""
    if why_not is not None:
        pytest.skip(why_not)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--show-capture=no",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, interpret.SWITCH: switch},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
