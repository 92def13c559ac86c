"""Bad groups and bad lookaheads: a clear error, and nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gcfunc
from tests.bad_input import LEAVES, MODEL, PARAMS, PLAIN, Case, require_refused


def partition(labels: Any, *names: str) -> Callable[[], object]:
    opts = {name: gcfunc.sgd(0.1) for name in names or ("a", "b")}
    return lambda: gcfunc.partition(opts, labels).init(PARAMS)


CASES: dict[str, Case] = {
    "an unknown label": (
        partition(lambda name, tensor: name[0]),
        ValueError,
        "labels: 3 leaves have a label without an optimizer, 'conv.weight' has 'c'; there are 'a'",
    ),
    "a label of another kind": (
        lambda: gcfunc.partition(
            {"a": gcfunc.sgd(0.1)},
            lambda name, tensor: ["a"],  # type: ignore[return-value]
        ).init(PARAMS),
        ValueError,
        "labels: 3 leaves have a label without an optimizer, 'conv.weight' has ['a']",
    ),
    "an unused label": (
        partition(lambda name, tensor: "a"),
        ValueError,
        "labels: no leaf has the label 'b'",
    ),
    "labels of another structure": (
        partition({"conv.weight": "a", "fc.weight": "b"}),
        ValueError,
        "labels does not match params; missing 'fc.bias'",
    ),
    "no labels": (
        partition(None),
        TypeError,
        f"labels must have the structure of params (leaves {LEAVES}), got a bare NoneType",
    ),
    "no groups": (
        lambda: gcfunc.partition({}, lambda name, tensor: "a"),
        ValueError,
        "optimizers is empty",
    ),
    "a group that is no optimizer": (
        lambda: gcfunc.partition({"a": gcfunc.sgd}, lambda name, tensor: "a"),  # type: ignore[dict-item]
        TypeError,
        "optimizers must map string labels to optimizers, got {'a': <function sgd",
    ),
    "a group of torch.optim": (
        lambda: gcfunc.partition(
            {"a": torch.optim.SGD(MODEL.parameters())},  # type: ignore[dict-item]
            lambda name, tensor: "a",
        ),
        TypeError,
        "optimizers must map string labels to optimizers, got {'a': SGD",
    ),
    "a label that is no string": (
        lambda: gcfunc.partition({0: PLAIN}, lambda name, tensor: 0),  # type: ignore[dict-item]
        TypeError,
        "optimizers must map string labels to optimizers, got {0: ",
    ),
    "groups that are a list": (
        lambda: gcfunc.partition([PLAIN], lambda name, tensor: 0),  # type: ignore[arg-type]
        TypeError,
        "optimizers must map string labels to optimizers, got [",
    ),
    "two groups of one name": (
        lambda: gcfunc.partition(
            {"a.b": PLAIN, "a": gcfunc.partition({"b": PLAIN}, lambda name, tensor: "b")},
            lambda name, tensor: "a",
        ),
        ValueError,
        "optimizers: two groups have one name, among 'a.b'",
    ),
    "lookahead of lookahead": (
        lambda: gcfunc.lookahead(gcfunc.lookahead(PLAIN)),
        ValueError,
        "lookahead(sgd) already is a lookahead",
    ),
    "lookahead of ranger": (
        lambda: gcfunc.lookahead(gcfunc.ranger()),
        ValueError,
        "lookahead(radam) already is a lookahead",
    ),
    "lookahead of a group of lookahead": (
        lambda: gcfunc.lookahead(
            gcfunc.partition({"a": PLAIN, "b": gcfunc.ranger()}, lambda name, tensor: "a")
        ),
        ValueError,
        "lookahead(radam) already is a lookahead",
    ),
    "lookahead of torch.optim": (
        lambda: gcfunc.lookahead(torch.optim.SGD(MODEL.parameters())),  # type: ignore[arg-type]
        TypeError,
        "inner must be an optimizer such as gcfunc.sgd(0.1), got SGD",
    ),
    "lookahead of a constructor": (
        lambda: gcfunc.lookahead(gcfunc.sgd),  # type: ignore[arg-type]
        TypeError,
        "inner must be an optimizer such as gcfunc.sgd(0.1), got <function sgd",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_changes_nothing(name: str) -> None:
    require_refused(CASES[name])
