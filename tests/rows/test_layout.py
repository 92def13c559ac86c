"""Which rows each program takes: each number of each tensor once, in few launches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness.shapes import MODELS
from gcfunc._rows.layout import BLOCKS, STEP, Launch, Problem, launches, shapes

SIZES = (1, 3, 9, 16, 17, 64, 147, 1000, 1024, 1152, 4096, 4100, 4608, 8192, 8193, 20000)


def covered(problems: list[Problem], found: list[Launch]) -> list[list[int]]:
    """How often each row of each problem is taken."""
    times = [[0] * problem.rows for problem in problems]
    for launch in found:
        for i, first in launch.programs.tolist():
            for row in range(first, min(first + launch.shape.rows, problems[i].rows)):
                times[i][row] += 1
    return times


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(SIZES), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([2, 4, 8]),
)
def test_each_row_is_taken_once(given_: list[tuple[int, int, bool, bool]], itemsize: int) -> None:
    problems = [Problem(rows * width, width if rowed else None) for rows, width, rowed, _ in given_]
    found = launches(problems, [even for *_, even in given_], itemsize)
    assert all(time == 1 for own in covered(problems, found) for time in own)
    for launch in found:
        assert launch.shape.rows * launch.shape.block <= 32 * launch.shape.warps * 16
        for i in {*launch.programs[:, 0].tolist()}:
            problem, even = problems[i], given_[i][3]
            assert launch.shape.long or problem.row <= launch.shape.block
            if launch.shape.vector > 1:
                assert even
                assert problem.row % launch.shape.vector == 0
                assert problem.numel % launch.shape.vector == 0


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_few_launches(model: str) -> None:
    sizes = [torch.Size(shape) for shape in MODELS[model]().values()]
    problems = [Problem(s.numel(), s[1:].numel() if len(s) > 1 else None) for s in sizes]
    found = launches(problems, [True] * len(sizes), 4)
    assert len(found) <= 6
    unaligned = launches(problems, [False] * len(sizes), 4)
    assert all(launch.shape.vector == 1 for launch in unaligned)


def test_long_rows_are_read_in_steps() -> None:
    longest = BLOCKS[-1]
    for row, even, long in (
        (longest, True, False),
        (longest + 4, True, True),
        (longest, False, True),
        (STEP, False, False),
    ):
        (launch,) = launches([Problem(2 * row, row)], [even], 4)
        assert launch.shape.long is long
        assert len(launch.programs) == 2


def test_what_is_not_centralized_is_cut_anywhere() -> None:
    problem = Problem(5000, None)
    assert (problem.row, problem.rows) == (1024, 5)
    assert shapes([problem, Problem(12, 3)]).tolist() == [[1024, 5000, 0], [3, 12, 1]]


def test_nothing_is_launched_for_empty_tensors() -> None:
    assert launches([Problem(0, None), Problem(0, 3)], [True, True], 4) == []
