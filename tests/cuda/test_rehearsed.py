"""What a GPU is for, through the kernels for it, in Triton's interpreter."""

import pytest

from benchmarks.cuda import interpret
from tests.cuda.processes import HERE, require_passes

REHEARSED = "test_donated[adamw] or test_packed[sgd] or missing or (test_16_bits and sgd)"
"""A part of it. make slow does all."""


def rehearsed(*arguments: str) -> None:
    tests = HERE.parent / "gpu"
    own = ["-c", str(tests / "pytest.ini"), str(tests), "--rehearse", "--interpret"]
    require_passes("1", interpret.why_not(), *own, *arguments)


def test_what_a_gpu_is_for_through_its_kernels() -> None:
    rehearsed("-k", REHEARSED)


@pytest.mark.slow
def test_all_that_a_gpu_is_for_through_its_kernels() -> None:
    rehearsed()
