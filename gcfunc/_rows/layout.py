"""Which rows each program of a launch takes, for tensors of any sizes at once.

A problem is one tensor with all that belongs to it (its gradient, its slots), which lie in memory
alike. Its rows are what is centralized, K numbers each; where nothing is, it is cut into rows of a
length that suits the kernel. Problems are sorted into launches by how many numbers a program
holds of a row, :data:`BLOCKS`, so that rows of 9 do not occupy the registers that rows of 4608
need. A model of any depth has a handful of launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = (16, 64, 256, 1024, 4096, 8192)
"""How many numbers of a row a program may hold."""
STEP = 4096
"""In steps of how many longer rows are read, twice if they are centralized. Those that are read
number by number are so if they are longer than this: they take twice the registers."""
FLAT = 1024
"""The length of the rows into which a problem is cut that has none of its own."""
THREADS = 128
"""Of a program; those that hold one long row have more."""
SMALL = 2**18
"""Up to so many numbers, with those that are held for nothing, problems join a launch for longer
rows: a launch of their own takes longer than that."""
BYTES = 16
"""What a thread reads at once, where addresses and rows are multiples of it."""


@dataclass(frozen=True)
class Problem:
    """A tensor's numbers, and how many of them each row has; ``None`` if it is cut anywhere."""

    numel: int
    width: int | None

    @property
    def row(self) -> int:
        """The length of a row that a program takes."""
        if self.width is not None:
            return self.width
        return min(FLAT, max(BLOCKS[0], 1 << (self.numel - 1).bit_length()))

    @property
    def rows(self) -> int:
        """How many there are; the last one may be short where nothing is centralized."""
        return -(-self.numel // self.row)


@dataclass(frozen=True)
class Shape:
    """What is compiled into a launch: one kernel for each."""

    block: int
    vector: int
    long: bool

    @property
    def numbers(self) -> int:
        """How many numbers of each tensor a thread holds; half as many if each is read apart."""
        return 16 if self.vector >= 4 else 8

    @property
    def rows(self) -> int:
        """How many rows a program takes."""
        return 1 if self.long else max(1, THREADS * self.numbers // self.block)

    @property
    def warps(self) -> int:
        """How many warps, of 32 threads, a program has."""
        return max(THREADS, self.block // self.numbers) // 32


@dataclass(frozen=True)
class Launch:
    """A shape, and for each of its programs the problem and the first row: int32, ``(n, 2)``."""

    shape: Shape
    programs: Tensor


def shape_of(row: int, vector: int) -> Shape:
    """How rows of a length are stepped."""
    if row > (BLOCKS[-1] if vector >= 4 else STEP):
        return Shape(STEP, vector, long=True)
    return Shape(next(block for block in BLOCKS if row <= block), vector, long=False)


def launches(problems: Sequence[Problem], aligned: Sequence[bool], itemsize: int) -> list[Launch]:
    """What to launch; ``aligned`` says whose addresses are all multiples of :data:`BYTES`."""
    most = BYTES // itemsize
    members: dict[Shape, list[int]] = {}
    for i, (problem, even) in enumerate(zip(problems, aligned, strict=True)):
        if problem.numel:
            vector = most if even and problem.row % most == problem.numel % most == 0 else 1
            members.setdefault(shape_of(problem.row, vector), []).append(i)
    joined = _joined(members, problems)
    return [
        Launch(shape, _programs([problems[i] for i in own], own, shape.rows))
        for shape, own in sorted(joined.items(), key=lambda item: (item[0].block, item[0].vector))
    ]


def shapes(problems: Sequence[Problem]) -> Tensor:
    """What a program reads of its problem: the row's length, numel, and whether it is centralized.

    int64, ``(problems, 3)``.
    """
    return torch.tensor([[p.row, p.numel, p.width is not None] for p in problems])


def _joined(members: dict[Shape, list[int]], problems: Sequence[Problem]) -> dict[Shape, list[int]]:
    """The same in fewer launches."""
    joined = dict(members)
    for shape in sorted(members, key=lambda s: (s.block, s.vector)):
        rows = sum(problems[i].rows for i in joined[shape])
        # What reads number by number serves all, what reads vectors only whole ones.
        larger = [
            other
            for other in joined
            if not (shape.long or other.long)
            and other != shape
            and (other.vector == 1 or other.vector == shape.vector)
            and other.block >= shape.block
            and not (other.block == shape.block and shape.vector == 1)
            and rows * other.block <= SMALL
        ]
        if larger:
            into = min(larger, key=lambda s: (s.block, -s.vector))
            joined[into] = sorted([*joined[into], *joined.pop(shape)])
    return joined


def _programs(problems: Sequence[Problem], index: Sequence[int], rows: int) -> Tensor:
    each = torch.tensor([-(-problem.rows // rows) for problem in problems])
    number = torch.tensor(index).repeat_interleave(each)
    within = torch.arange(len(number)) - (each.cumsum(0) - each).repeat_interleave(each)
    return torch.stack([number, within * rows], 1).to(torch.int32)
