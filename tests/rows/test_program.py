"""Formulas printed as Triton, as text: what it gives is tested in tests/cuda and tests/gpu."""

import ast
import itertools
import re
from typing import Literal

import pytest
import torch
from torch import Tensor

import gcfunc
from gcfunc._compiled.rows import program_for
from gcfunc._rows.fit import LONGEST, in_rows, without_gaps
from gcfunc._rows.program import Formula, program_of
from tests.cases import ALGORITHMS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("at", ["gradient", "update"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_printed(name: str, at: Literal["gradient", "update"]) -> None:
    opt, plain = ALGORITHMS[name](gcfunc.GC(at=at)), ALGORITHMS[name](None)
    for algorithm, dtype in itertools.product(opt.algorithms.values(), DTYPES):
        program = program_for(algorithm, dtype)
        assert program is not None
        ast.parse(program)
        assert ("mean = row_mean(" in program) is (algorithm.gc is not None)
        scalars = 1 + len(algorithm.hyperparams)
        assert f"scalar_{scalars - 1}, VECTOR" in program
        slots = len(algorithm.slots)
        # Whole rows are read once each and written once each.
        whole, _ = program.split("def whole_rows")[1].split("def long_rows")
        loads, stores = (re.findall(rf"tl\.{kind}\(at_(\d+) ", whole) for kind in ("load", "store"))
        assert [*map(int, loads)] == [*range(2 + slots)]
        assert [*map(int, stores)] == [*range(2 + slots, 3 + 2 * slots)]
    for algorithm in plain.algorithms.values():
        without = program_for(algorithm, torch.float32)
        assert without is not None
        assert "row_mean(" not in without.split("def whole_rows")[1]


def sorted_rows(tensors: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    return [tensors[0].sort(1).values]


def mean_of_columns(tensors: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    return [tensors[0] - tensors[0].mean(0, keepdim=True)]


def two_means(tensors: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    first = tensors[0] - tensors[0].mean(1, keepdim=True)
    return [first * first.abs().mean(1, keepdim=True)]


@pytest.mark.parametrize("formula", [sorted_rows, mean_of_columns, two_means])
def test_what_has_no_spelling_is_left_to_inductor(formula: Formula) -> None:
    assert program_of(formula, torch.float32, 1, ()) is None


def test_a_program_can_be_read() -> None:
    def decayed(tensors: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
        (x,), (decay,) = tensors, scalars
        return [x - x.mean(1, keepdim=True) - decay.to(torch.float32) * x]

    program = program_of(decayed, torch.float32, 1, (torch.float64,))
    assert program is not None
    whole = program.split("def whole_rows")[1].split("def long_rows")[0]
    body = [line.strip() for line in whole.splitlines()]
    start = body.index("mean = row_mean(tensors_1, mask, count, centralized)")
    assert body[start : start + 4] == [
        "mean = row_mean(tensors_1, mask, count, centralized)",
        "sub = tensors_1 - mean",
        "mul = _to_copy * tensors_1",
        "sub_1 = sub - mul",
    ]
    assert "_to_copy = scalars_1.to(tl.float32)" in body


def test_fit_knows_rows_from_other_layouts() -> None:
    weight = torch.empty(4, 3, 5, 5)
    assert in_rows([weight, torch.empty_like(weight)])
    assert in_rows([weight.to(memory_format=torch.channels_last)])
    assert in_rows([torch.empty(1, 7), torch.empty(1, 7)])
    assert in_rows([torch.empty(0, 7)])
    assert not in_rows([weight, weight.to(memory_format=torch.channels_last)])
    assert not in_rows([weight.permute(1, 0, 2, 3)])
    assert not in_rows([torch.empty(1, LONGEST + 1)])
    assert without_gaps([torch.empty(3, 4).t()])
    assert not without_gaps([torch.empty(3, 8)[:, ::2]])
    assert not without_gaps([torch.empty(1).expand(3)])
