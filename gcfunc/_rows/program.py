"""A formula on one tensor as a Triton program for many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from gcfunc._rows.printing import (
    TYPES,
    UnprintableError,
    dtype_of,
    is_mean,
    is_scalar,
    statements,
)
from gcfunc._tensors import compiling
from gcfunc._tensors.lists import tensor_by_tensor

Formula = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""``(tensors of one shape, 0-d scalars) -> the new tensors``, row by row."""


Program = str
"""Triton source of a module with the kernels ``whole_rows`` and ``long_rows``."""


@lru_cache(maxsize=64)
def program_of(
    formula: Formula,
    dtype: torch.dtype,
    reads: int,
    scalars: tuple[torch.dtype, ...],
    *,
    alone: bool = False,
) -> Program | None:
    """The program of a formula, or ``None`` if it does what has no spelling in Triton.

    It is for any number of problems, whose addresses are in a table, or for one ``alone``, whose
    tensors it is called with.
    """
    graph = _trace(formula, dtype, reads, scalars)
    try:
        return _printed(graph, dtype, reads, alone)
    except UnprintableError:
        return None


def _trace(
    formula: Formula, dtype: torch.dtype, reads: int, scalars: Sequence[torch.dtype]
) -> fx.Graph:
    # One tensor for each: make_fx takes equal tensors for one input.
    tensors = [torch.zeros(2, 3, dtype=dtype, device="cpu") for _ in range(reads)]
    numbers = [torch.ones((), dtype=scalar, device="cpu") for scalar in scalars]
    # make_fx patches nn.Module for all threads.
    with compiling.alone(), torch.no_grad(), tensor_by_tensor():
        made: Any = make_fx(formula, tracing_mode="fake")
        graph: fx.Graph = made(tensors, numbers).graph
    graph.eliminate_dead_code()
    return graph


def _printed(graph: fx.Graph, dtype: torch.dtype, reads: int, alone: bool) -> Program:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    tensors, scalars = inputs[:reads], inputs[reads:]
    blocks = [node for node in nodes if not is_scalar(node)]
    means = [node for node in blocks if is_mean(node)]
    if len(means) > 1 or any(not isinstance(result, fx.Node) for result in results):
        raise UnprintableError("more than one mean")

    def loaded(used: Sequence[fx.Node], extra: str = "") -> list[str]:
        read = {*used}.union(*(node.all_input_nodes for node in used))
        return [
            f"{node.name} = tl.load(at_{i} + offset, mask, other=0.0{extra})"
            for i, node in enumerate(tensors)
            if node in read
        ]

    wide = TYPES[dtype_of(means[0])] if means else "tl.float32"
    columns = reads + len(results)
    head = [
        *(_FOR_ONE if alone else _FROM_TABLES),
        f"count = width.to({wide})",
        *(_pointer(i, columns, dtype, alone) for i in range(columns)),
        *(f"{node.name} = tl.load(scalar_{i})" for i, node in enumerate(scalars)),
        *statements(node for node in nodes if is_scalar(node)),
    ]
    stores = [
        f"tl.store(at_{i} + offset, {result.name}, mask)"
        for i, result in enumerate(results, start=reads)
    ]
    whole = [
        "column = tl.arange(0, BLOCK)[None, :]",
        "offset = (first + tl.arange(0, ROWS)[:, None]) * width + column",
        "mask = (column < width) & (offset < numel)",
        *loaded([*blocks, *results]),
        *statements(blocks),
        *stores,
    ]
    each = [
        "column = start + tl.arange(0, BLOCK)[None, :]",
        "offset = first * width + column",
        "mask = (column < width) & (offset < numel)",
    ]
    long: list[str] = []
    for mean in means:
        before = _made_for(mean, blocks)
        # These are read again below, from the cache if it is large enough.
        again = loaded([*before, mean], ', eviction_policy="evict_last"')
        long += [
            f"total = tl.zeros((1, BLOCK), {wide})",
            "for start in range(0, width, BLOCK):",
            *_indented([*each, *again, *statements(before)]),
            f"    total += tl.where(mask, {mean.all_input_nodes[0].name}, 0.0)",
            f"{mean.name} = row_mean(total, tl.full((1, BLOCK), 1, tl.int1), count, centralized)",
        ]
    rest = [node for node in blocks if node not in means]
    long += [
        "for start in range(0, width, BLOCK):",
        *_indented([*each, *loaded([*rest, *results]), *statements(rest), *stores]),
    ]
    own = [f"at_{i}" for i in range(columns)] + ["width", "numel"]
    given = own if alone else [*_TABLES]
    arguments = [*given, *(f"scalar_{i}" for i in range(len(scalars)))]
    lines = [
        *_HEAD,
        *_kernel("whole_rows", arguments, [*head, *whole]),
        *_kernel("long_rows", arguments, [*head, *long]),
    ]
    return "\n".join([*lines, ""])


def _pointer(i: int, columns: int, dtype: torch.dtype, alone: bool) -> str:
    """One of a problem's tensors; that it starts at a multiple of 16 bytes, if it does."""
    at = f"tl.load(addresses + {columns} * tensor + {i}).to(tl.pointer_type({TYPES[dtype]}))"
    return f"at_{i} = tl.multiple_of({f'at_{i}' if alone else at}, ALIGNED)"


_TABLES = ("programs", "shapes", "addresses")
_FROM_TABLES = (
    "program = tl.program_id(0)",
    "tensor = tl.load(programs + 2 * program).to(tl.int64)",
    "first = tl.load(programs + 2 * program + 1).to(tl.int64)",
    "width = tl.load(shapes + 3 * tensor) // VECTOR * VECTOR",
    "numel = tl.load(shapes + 3 * tensor + 1) // VECTOR * VECTOR",
    "centralized = tl.load(shapes + 3 * tensor + 2) != 0",
)
"""What a program does, from what :mod:`gcfunc._rows.layout` lays out."""

_FOR_ONE = (
    "first = tl.program_id(0).to(tl.int64) * ROWS",
    "width = tl.cast(width, tl.int64) // VECTOR * VECTOR",
    "numel = tl.cast(numel, tl.int64) // VECTOR * VECTOR",
    "centralized = width > 0",
)
"""The same where all rows are of one problem."""

_HEAD = '''import triton
import triton.language as tl


@triton.jit
def row_mean(x, mask, count, centralized):
    """The mean of each row; 0 for tensors that are not centralized, whatever is in them."""
    total = tl.sum(tl.where(mask, x, 0.0), 1)[:, None]
    if total.dtype == tl.float32:
        mean = tl.div_rn(total, count)
    else:
        mean = total / count
    return tl.where(centralized, mean, 0.0)
'''.splitlines()


def _kernel(name: str, arguments: Sequence[str], body: Sequence[str]) -> Iterator[str]:
    # Triton would compile anew for a scalar at another address, or a width divisible by 16. Of the
    # tensors' own addresses it has to know that they are.
    single = [name for name in arguments if name.startswith(("scalar", "width", "numel"))]
    constants = [f"{name}: tl.constexpr" for name in ("VECTOR", "ALIGNED", "ROWS", "BLOCK")]
    yield from ("", "", f"@triton.jit(do_not_specialize={single!r})")
    yield f"def {name}({', '.join([*arguments, *constants])}):"
    yield from _indented(body)


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _made_for(mean: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What a mean is made of, in order."""
    needed: set[fx.Node] = set()
    open_ = [mean]
    while open_:
        found = {*open_.pop().all_input_nodes} - needed
        needed |= found
        open_ += found
    return [node for node in nodes if node in needed]
