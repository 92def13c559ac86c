"""What Inductor generates for a GPU, in processes of their own.

Triton's functions are made either to be interpreted or to be compiled, once for a process, and a
device that is not there should not be seen by other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cuda import fake, interpret

HERE = Path(__file__).parent


REHEARSED = (
    "test_donated[sgd-momentum] or test_donated[adamw] or test_donated[ranger]"
    " or test_donated[lion] or test_packed[sgd] or test_packed[adamw] or test_pure[adagrad]"
    " or test_16_bits"
    " or aligned or missing or test_a_training_step or test_hooks"
)
"""A part of what a GPU is for, through the kernels for it. make slow does all."""


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


@pytest.mark.parametrize("file", ["generating.py", "counting.py"])
def test_what_is_generated(file: str) -> None:
    require_passes("0", fake.why_not(), str(HERE / file))


@pytest.mark.parametrize("file", ["interpreting.py", "breaking.py", "failing.py"])
def test_what_is_interpreted(file: str) -> None:
    require_passes("1", interpret.why_not(), str(HERE / file))


def rehearsed(*arguments: str) -> None:
    tests = HERE.parent / "gpu"
    own = ["-c", str(tests / "pytest.ini"), str(tests), "--rehearse", "--interpret"]
    require_passes("1", interpret.why_not(), *own, *arguments)


def test_what_a_gpu_is_for_through_its_kernels() -> None:
    rehearsed("-k", REHEARSED)


@pytest.mark.slow
def test_all_that_a_gpu_is_for_through_its_kernels() -> None:
    rehearsed()
