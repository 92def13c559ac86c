"""How fast the machine might step: the bytes that a step must move, at the bandwidth of a copy.

- A step must read params, gradients and slots once, and write params and slots once.
- A copy of n bytes moves 3 n on a CPU, which reads the lines that it is about to overwrite as well
  (write-allocate): counted as 2 n, it would be half as fast as writing in place. Elsewhere it moves
  2 n. Where a CPU avoids those reads, the limit lies up to 1.5 times too low.
- The copy touches as much memory as the step, up to ``MOST``, so that a step that fits a cache is
  held to that cache's bandwidth.
- No strict limit, therefore: torch's fused step, which reads from three places or four at once, was
  up to 1.4 times as fast (benchmarks/results/scaling.json). Small copies and steps are calls, not
  traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.harness.shapes import Shapes

SLOTS = {"sgd": 1, "adamw": 2, "adagrad": 1}
FLOAT32 = 4
MOST = 2**31
"""Larger than caches."""


def elements(shapes: Shapes) -> int:
    """How many parameters there are."""
    return sum(map(math.prod, shapes.values()))


def held(algorithm: str, shapes: Shapes) -> int:
    """Bytes of params, gradients and slots."""
    return FLOAT32 * elements(shapes) * (2 + SLOTS[algorithm])


def moved(algorithm: str, shapes: Shapes) -> int:
    """Bytes that a step must read or write."""
    return held(algorithm, shapes) + FLOAT32 * elements(shapes) * (1 + SLOTS[algorithm])


class Copy(NamedTuple):
    """A copy from one place to another, and how many bytes it moves."""

    call: Callable[[], object]
    moved: int


def copy(size: int, device: str = "cpu") -> Copy:
    """One that touches ``size`` bytes, about."""
    source = torch.ones(max(1, min(size, MOST) // (2 * FLOAT32)), device=device)
    target = torch.zeros_like(source)
    return Copy(lambda: target.copy_(source), (3 if device == "cpu" else 2) * source.nbytes)
