"""What gcfunc's row kernel launches on a GPU: how often, what it moves, what it compiles to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.cuda.generated import Call, Generated
from benchmarks.cuda.registers import Compiled, assembled
from gcfunc._rows.launch import Launcher, compiled_in, kernels_of
from gcfunc._rows.layout import Launch, Problem, launches

OPERATORS = ("torch.ops.gcfunc.step_rows_.default", "torch.ops.gcfunc.step_rows.default")
"""The row kernel in a graph."""

POINTERS = {torch.int64: "*i64", torch.float64: "*fp64"}


@dataclass(frozen=True)
class Rows:
    """One call of the row kernel.

    Attributes:
        source: Of its program.
        problems: What it is called for.
        dtype: Of their tensors.
        scalars: The dtypes of its scalars.
    """

    source: str
    problems: tuple[Problem, ...]
    dtype: torch.dtype
    scalars: tuple[torch.dtype, ...]

    @property
    def launches(self) -> list[Launch]:
        """What is launched, where the allocator gives the addresses, multiples of 512 bytes."""
        return launches(self.problems, [True] * len(self.problems), self.dtype.itemsize)

    def moved(self, launch: Launch) -> tuple[int, int]:
        """The bytes that a launch loads and stores, each number of each tensor once."""
        numels = sum(self.problems[i].numel for i in {*launch.programs[:, 0].tolist()})
        body = self._body(launch)
        return (
            len(set(re.findall(r"tl\.load\((at_\d+) ", body))) * numels * self.dtype.itemsize,
            len(set(re.findall(r"tl\.store\((at_\d+) ", body))) * numels * self.dtype.itemsize,
        )

    def _body(self, launch: Launch) -> str:
        whole, long = self.source.split("def whole_rows")[1].split("def long_rows")
        return long if launch.shape.long else whole

    def compiled(self, launch: Launch) -> Compiled:
        """The kernel of a launch compiled for an H100."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        whole, long = kernels_of(self.source)
        constants = compiled_in(launch.shape, self.dtype)
        warps = constants.pop("num_warps")
        tables = {"programs": "*i32", "shapes": "*i64", "addresses": "*i64"}
        given = tables | {f"scalar_{i}": POINTERS[dtype] for i, dtype in enumerate(self.scalars)}
        binary: Any = triton.compile(
            ASTSource(
                long if launch.shape.long else whole,
                given | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                attrs={(i,): [["tt.divisibility", 16]] for i in range(len(tables))},
            ),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps},
        )
        return assembled(binary.asm["ptx"], constants, warps)


@contextmanager
def recorded() -> Iterator[list[Rows]]:
    """The calls of the row kernel outside of graphs; nothing is launched."""
    found: list[Rows] = []

    def prepared(launcher: Launcher, columns: object, scalars: Iterable[torch.Tensor]) -> Any:
        own = tuple(launcher.problems), launcher.dtype, tuple(s.dtype for s in scalars)
        return lambda: found.append(Rows(launcher.source, *own))

    with mock.patch.object(Launcher, "prepared", prepared):
        yield found


def in_graph(generated: Generated) -> list[Rows]:
    """The calls of the row kernel in a generated graph."""
    return [_rows(call, generated) for call in generated.externs if call.name in OPERATORS]


def _rows(call: Call, generated: Generated) -> Rows:
    """A call from its arguments, of which the graph's inputs have shapes."""
    (unpacked,) = re.findall(r"^    *(.*) = args$", generated.source, re.MULTILINE)
    names = [name.strip() for name in unpacked.strip("()").split(",") if name.strip()]
    inputs = dict(zip(names, generated.inputs, strict=True))
    params, _, _, scalars, source, widths = map(_parsed, call.arguments)
    own = [inputs[name] for name in params]
    problems = [Problem(t.numel(), w or None) for t, w in zip(own, widths, strict=True)]
    return Rows(source, tuple(problems), own[0].dtype, tuple(inputs[s].dtype for s in scalars))


def _parsed(argument: str) -> Any:
    """A literal, or names in a list."""
    node = ast.parse(argument, mode="eval").body
    if isinstance(node, ast.List) and all(isinstance(e, ast.Name) for e in node.elts):
        return [ast.unparse(e) for e in node.elts]
    return ast.literal_eval(node)
