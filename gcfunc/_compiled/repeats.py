"""How a step is cut into substeps that repeat, as a model's layers do: less to compile."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Iterator, Sequence
from functools import cache, lru_cache

from torch import Tensor

from gcfunc._step.bucket import Bucket

PER_CALL = 10
"""How many tensors compiled once must be saved to call one more graph in every step."""


def split(
    buckets: Sequence[Bucket], leaves: Sequence[Tensor]
) -> Iterator[list[tuple[int, list[int]]]]:
    """Substeps of which many are alike, so that they share a compiled graph.

    Each is a list of buckets by their position, and the positions of its leaves in the bucket.
    Inductor takes 0.2 to 0.5 s for each tensor on the CPU, alike or not. A model's tensors repeat:
    with n tensors of one kind, r substeps of n // r need only n // r compiled.
    """
    kinds: dict[Hashable, list[tuple[int, int]]] = {}
    for i, bucket in enumerate(buckets):
        for j, (p, projection) in enumerate(
            zip(bucket.pick(leaves), bucket.projections, strict=True)
        ):
            kinds.setdefault((i, projection, p.shape, p.stride()), []).append((i, j))
    left = [iter(members) for members in kinds.values()]
    for times, taken in repeats(tuple(len(members) for members in kinds.values())):
        for _ in range(times):
            own: dict[int, list[int]] = {}
            for members, n in zip(left, taken, strict=True):
                for i, j in itertools.islice(members, n):
                    own.setdefault(i, []).append(j)
            yield list(own.items())


@lru_cache
def repeats(counts: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """How often to repeat which substep, ``(times, tensors of each kind)``, for the least cost."""

    @cache
    def best(counts: tuple[int, ...], most: int) -> tuple[int, list[tuple[int, tuple[int, ...]]]]:
        if not any(counts):
            return 0, []
        options = []
        for r in range(1, min(most, max(counts)) + 1):
            taken = tuple(n // r for n in counts)
            cost, rest = best(tuple(n % r for n in counts), r - 1)
            options.append((cost + sum(taken) + PER_CALL * r, [(r, taken), *rest]))
        return min(options, key=operator.itemgetter(0))

    return best(counts, 16)[1]
