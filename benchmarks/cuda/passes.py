"""The bytes that a generated kernel loads and stores, from its source.

A load or a store is an index over ranges, ``tl.load(in_ptr0 + (r0_1 + 576*x0))``, and each range
has a length that is written above it. So the elements are the product of the lengths.
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from benchmarks.cuda.generated import Generated
from benchmarks.cuda.kernels import parsed

Rows = Literal["none", "persistent", "looped"]

BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "i64": 8}
BYTES |= {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
"""Of Triton's types."""


@dataclass(frozen=True)
class Section:
    """What a kernel does to one loop nest: all that it does, or a branch if it does several.

    Attributes:
        rows: ``"persistent"`` where a program keeps whole rows that it reduces in registers,
            ``"looped"`` where it goes over them piece by piece, and once more for what follows.
        count: How many rows; without a reduction, how many elements.
        width: The length of a row; without a reduction, 1.
        loaded: Bytes that are loaded, each pointer's once: what memory sends, if what is loaded
            again is still in a cache. Two parts of one tensor count as the larger.
        stored: Bytes that are stored, likewise.
        issued: Bytes of all loads and stores, as often as they stand there.
    """

    rows: Rows
    count: int
    width: int
    loaded: int
    stored: int
    issued: int


@dataclass(frozen=True)
class Traffic:
    """The bytes of one launch or several; see :class:`Section`."""

    loaded: int
    stored: int
    issued: int

    @property
    def moved(self) -> int:
        """Bytes between memory and device, each pointer's once."""
        return self.loaded + self.stored


def launched(generated: Generated) -> list[list[Section]]:
    """The sections of each launch, in order."""
    return [sections(generated.kernels[launch.name]) for launch in generated.launches]


def total(found: Iterable[Section]) -> Traffic:
    """The bytes of these sections together."""
    every = [*found]
    return Traffic(
        sum(section.loaded for section in every),
        sum(section.stored for section in every),
        sum(section.issued for section in every),
    )


def sections(source: str) -> list[Section]:
    """The sections of a kernel, from its source."""
    kernel = parsed(source)
    return [_section(branch, kernel.signature) for branch in _branches(kernel.function.body)]


def _branches(body: list[ast.stmt]) -> list[list[ast.stmt]]:
    """Of combo and foreach kernels, where a program asks by its number which branch is its own.

    From torch 2.14 branches that do the same only name their pointers, and it is done after them.
    """
    for i, statement in enumerate(body):
        if isinstance(statement, ast.If) and "pid" in ast.unparse(statement.test):
            found = []
            chain: list[ast.stmt] = [statement]
            while len(chain) == 1 and isinstance(branch := chain[0], ast.If):
                found.append([*body[:i], *branch.body, *body[i + 1 :]])
                chain = branch.orelse
            return found
    return [body]


def _section(body: list[ast.stmt], signature: dict[str, str]) -> Section:
    nodes = [node for statement in body for node in ast.walk(statement)]
    ranges = _Ranges(nodes)
    width = prod(n for name, n in ranges.lengths.items() if re.fullmatch(r"r\d+_index", name))
    count = prod(n for name, n in ranges.lengths.items() if re.fullmatch(r"[xyz]index", name))
    pointers = {name: name for name in signature} | dict(map(_renamed, nodes))
    accesses = []
    for kind, name, index in map(_access, nodes):
        if kind:
            pointer = pointers[name]
            elements = min(ranges.of(index), count * width)
            accesses.append((kind, pointer, elements * BYTES[signature[pointer].lstrip("*")]))
    once: dict[tuple[str, str], int] = {}
    for kind, pointer, nbytes in accesses:
        once[kind, pointer] = max(once.get((kind, pointer), 0), nbytes)
    return Section(
        "none" if width == 1 else "looped" if any(map(_over_rows, nodes)) else "persistent",
        count,
        width,
        sum(nbytes for (kind, _), nbytes in once.items() if kind == "load"),
        sum(nbytes for (kind, _), nbytes in once.items() if kind == "store"),
        sum(nbytes for _, _, nbytes in accesses),
    )


def _over_rows(node: ast.AST) -> bool:
    return isinstance(node, ast.For) and ast.unparse(node.target).startswith("r")


def _access(node: ast.AST) -> tuple[str, str, ast.expr]:
    """``load`` or ``store``, the pointer and the index; an empty word of all else."""
    match node:
        case ast.Call(
            ast.Attribute(ast.Name("tl"), "load" | "store" as kind),
            [ast.BinOp(ast.Name(pointer), ast.Add(), index), *_],
        ):
            return kind, pointer, index
        case ast.Call(ast.Attribute(ast.Name("tl"), name)) if re.match("load|store|atomic", name):
            raise RuntimeError(f"an access of another form: {ast.unparse(node)}")
    return "", "", ast.Constant(0)


def _renamed(node: ast.AST) -> tuple[str, str]:
    match node:
        case ast.Assign([ast.Name(new)], ast.Name(old)):
            return new, old
    return "", ""


class _Ranges:
    """How many values each index takes."""

    def __init__(self, nodes: list[ast.AST]) -> None:
        self.lengths: dict[str, int] = {}
        for node in nodes:
            match node:
                case ast.Assign([ast.Name(name)], ast.Constant(int(length))):
                    if found := re.fullmatch(r"([xyz]|r\d+_)numel", name):
                        self.lengths[f"{found[1]}index"] = length
        if "xindex" not in self.lengths:
            raise RuntimeError("the sizes are not numbers: compile with dynamic=False")
        for node in nodes:
            match node:
                case ast.Assign([ast.Name(name)], value) if re.fullmatch(r"[xyzr]\d+(_\d+)?", name):
                    self.lengths[name] = self.of(value)

    def of(self, index: ast.expr) -> int:
        """How many values an index takes, if different ranges never meet in one value."""
        match index:
            case ast.Constant():
                return 1
            case ast.Name(name) if name in self.lengths:
                return self.lengths[name]
            case ast.BinOp(inner, ast.FloorDiv(), ast.Constant(int(by))):
                return ceil(self.of(inner) / by)
            case ast.BinOp(inner, ast.Mod(), ast.Constant(int(by))):
                return min(self.of(inner), by)
            case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult(), right):
                return self.of(left) * self.of(right)
            case ast.UnaryOp(ast.USub(), inner):
                return self.of(inner)
            # One number: tl.full([XBLOCK], 0, tl.int32).broadcast_to(XBLOCK)
            case ast.Call(ast.Attribute(ast.Call() as inner, "broadcast_to")):
                return self.of(inner)
            case ast.Call(ast.Attribute(ast.Name("tl"), "full")):
                return 1
        raise RuntimeError(f"an index of another form: {ast.unparse(index)}")
