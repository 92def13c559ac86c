"""Estimates of times, and the launches of torch's fused optimizers."""

import pytest

from benchmarks.cuda.roofline import BANDWIDTH, CHUNK, LAUNCH, estimate, fused_launches


def test_an_estimate_adds_bytes_and_launches() -> None:
    assert estimate(int(BANDWIDTH), 0) == 1
    assert estimate(0, 3) == 3 * LAUNCH


@pytest.mark.parametrize(
    ("numels", "lists", "large", "launches"),
    [
        ([], 3, True, 0),
        ([0], 3, True, 0),
        ([1], 3, True, 1),
        ([1] * 336, 3, True, 1),
        ([1] * 337, 3, True, 2),
        ([1] * 48, 3, False, 1),
        ([1] * 49, 3, False, 2),
        ([1] * 37, 4, False, 2),
        ([320 * CHUNK], 3, False, 1),
        ([320 * CHUNK + 1], 3, False, 2),
        ([320 * CHUNK + 1], 3, True, 1),
        # The one that goes on is among the 48 tensors of the second launch.
        ([321 * CHUNK, *[1] * 47], 3, False, 2),
        ([321 * CHUNK, *[1] * 48], 3, False, 3),
    ],
)
def test_fused_launches_end_where_tensors_or_blocks_are_full(
    numels: list[int], lists: int, large: bool, launches: int
) -> None:
    assert fused_launches(numels, lists, large=large) == launches
