"""Bad choices of what is centralized: a clear error, and nothing changed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gcfunc
from gcfunc import GC, Units
from gcfunc._centralization.where import RULES
from tests.bad_input import (
    FLOATS,
    GRADS,
    LEAVES,
    MODEL,
    PARAMS,
    PLAIN,
    SORTED,
    Case,
    one_else,
    require_refused,
    step,
)

NAMES = ", ".join(map(repr, RULES))

NO_GCS: list[tuple[Any, type[Exception]]] = [
    ("GC", ValueError),
    ("", ValueError),
    ("update", ValueError),
    (True, TypeError),
    (1, TypeError),
    (GC, TypeError),
    (["gc"], TypeError),
]


def where(where: Any) -> Callable[[], object]:
    return lambda: gcfunc.sgd(0.1, gc=GC(where=where)).init(PARAMS)


def mask(**given: Any) -> dict[str, Any]:
    return {"conv.weight": True, "fc.weight": False, "fc.bias": False} | given


def by_units(units: Any) -> Callable[[str, Tensor], Any]:
    return lambda name, tensor: tensor.ndim >= 2 and units


CASES: dict[str, Case] = {
    # GC
    **{
        f"gc={gc!r}": (
            partial(gcfunc.adamw, gc=gc),
            error,
            (
                f"gc must be None, {NAMES} or a gcfunc.GC, which takes a mask or a "
                f"predicate as GC(where=...); got {gc!r}"
            ),
        )
        for gc, error in NO_GCS
    },
    "an unknown rule": (
        lambda: GC("conv"),
        ValueError,
        f"where must be one of {NAMES}, got 'conv'",
    ),
    "an unknown rule, outside a step": (
        lambda: gcfunc.centralize(GRADS, where="conv"),
        ValueError,
        f"where must be one of {NAMES}, got 'conv'",
    ),
    "an unknown place": (
        lambda: GC(at="weights"),  # type: ignore[arg-type]
        ValueError,
        "at must be 'gradient' or 'update', got 'weights'",
    ),
    "no place": (
        lambda: GC(at=None),  # type: ignore[arg-type]
        ValueError,
        "at must be 'gradient' or 'update', got None",
    ),
    "nothing to centralize": (
        lambda: gcfunc.sgd(0.1, gc="gc").init({"fc.bias": PARAMS["fc.bias"]}),
        ValueError,
        "where='gc' selects none of 1 tensors (fc.bias (5,)); nothing would be centralized",
    ),
    "no convolutions": (
        lambda: gcfunc.sgd(0.1, gc="gcc").init(dict(MODEL.named_parameters())),
        ValueError,
        "where='gcc' selects none of 4 tensors (0.weight (2, 3), 0.bias (2,), 1.weight (2,), ",
    ),
    "nothing to centralize in a group": (
        lambda: gcfunc.partition(
            {"w": PLAIN, "b": gcfunc.sgd(0.1, gc="gc")},
            lambda name, tensor: "w" if tensor.ndim >= 2 else "b",
        ).init(PARAMS),
        ValueError,
        "where='gc' selects none of 1 tensors (fc.bias (5,))",
    ),
    "a predicate that takes nothing": (
        where(lambda name, tensor: False),
        ValueError,
        "where=<function> selects none of 3 tensors (conv.weight (4, 3, 2, 2), fc.weight (5, 6), ",
    ),
    "a predicate that takes vectors only": (
        where(lambda name, tensor: "bias" in name),
        ValueError,
        "where=<function> selects none of 3 tensors",
    ),
    "a predicate that returns a number": (
        where(lambda name, tensor: tensor.ndim - 1),
        TypeError,
        "where: 'conv.weight' must map to a bool or Units, got 3",
    ),
    "a predicate that forgets to return": (
        where(lambda name, tensor: None),
        TypeError,
        "where: 'conv.weight' must map to a bool or Units, got None",
    ),
    "a mask that lacks a leaf": (
        where({"conv.weight": True, "fc.weight": True}),
        ValueError,
        "where does not match params; missing 'fc.bias'",
    ),
    "a mask of other names": (
        where({"weight": True}),
        ValueError,
        f"where does not match params; missing {SORTED}; unexpected 'weight'",
    ),
    "a mask of names": (
        where(["conv.weight", "fc.weight"]),
        ValueError,
        f"where does not match params; missing {SORTED}; unexpected '0', '1'",
    ),
    "a mask that is one bool": (
        where(True),
        TypeError,
        f"where must have the structure of params (leaves {LEAVES}), got a bare bool",
    ),
    "a mask that is None": (
        where(None),
        TypeError,
        f"where must have the structure of params (leaves {LEAVES}), got a bare NoneType",
    ),
    "a mask of tensors": (
        where(mask(**{"fc.weight": torch.tensor(True)})),
        TypeError,
        "where: 'fc.weight' must map to a bool or Units, got tensor(True)",
    ),
    "a mask of integers": (
        where(mask(**{"fc.weight": 1})),
        TypeError,
        "where: 'fc.weight' must map to a bool or Units, got 1",
    ),
    "a mask that takes nothing": (
        where(mask(**{"conv.weight": False})),
        ValueError,
        "where=<dict> selects none of 3 tensors (conv.weight (4, 3, 2, 2), ",
    ),
    "a mask of another model, in step": (
        lambda: step(gcfunc.adamw(0.1, gc=GC(where=gcfunc.select(MODEL)))),
        ValueError,
        f"where does not match params; missing {SORTED}; unexpected '0.bias', '0.weight'",
    ),
    **{
        f"{units} do not fit": (
            where(by_units(units)),
            ValueError,
            f"where: {units} does not fit 'conv.weight' of shape (4, 3, 2, 2)",
        )
        for units in (Units(dim=4), Units(dim=-1), Units(groups=3), Units(groups=0))
    },
    "centralize nothing": (
        lambda: gcfunc.centralize([]),
        ValueError,
        "tree holds no tensors",
    ),
    "centralize integers": (
        lambda: gcfunc.centralize({"a": torch.ones(2, 2, dtype=torch.int64)}),
        TypeError,
        f"tree: 'a' has dtype torch.int64; {FLOATS}",
    ),
    "centralize a missing gradient": (
        lambda: gcfunc.centralize(one_else("fc.bias", None)),
        TypeError,
        "tree: 'fc.bias' must be a tensor, got NoneType",
    ),
    # Select
    "select from params": (
        lambda: gcfunc.select(dict(MODEL.named_parameters())),  # type: ignore[arg-type]
        TypeError,
        "model must be a torch.nn.Module, got dict",
    ),
    "select from a class": (
        lambda: gcfunc.select(nn.Linear),  # type: ignore[arg-type]
        TypeError,
        "model must be a torch.nn.Module, got type",
    ),
    "select by an unknown rule": (
        lambda: gcfunc.select(MODEL, "conv"),
        ValueError,
        f"where must be one of {NAMES}, got 'conv'",
    ),
    "select by None": (
        lambda: gcfunc.select(MODEL, None),  # type: ignore[arg-type]
        ValueError,
        f"where must be one of {NAMES}, got None",
    ),
    "select from a lazy model": (
        lambda: gcfunc.select(nn.Sequential(nn.LazyLinear(2))),
        ValueError,
        "'weight' of a LazyLinear has no shape yet; run the model once",
    ),
    "layers that are a list": (
        lambda: gcfunc.select(MODEL, layers=[nn.Linear]),  # type: ignore[arg-type]
        TypeError,
        "layers must map module classes to gcfunc.Units, got [<class",
    ),
    "layers that map to a bool": (
        lambda: gcfunc.select(MODEL, layers={nn.Linear: True}),  # type: ignore[dict-item]
        TypeError,
        "layers must map module classes to gcfunc.Units, got {<class",
    ),
    "layers by name": (
        lambda: gcfunc.select(MODEL, layers={"Linear": Units()}),  # type: ignore[dict-item]
        TypeError,
        "layers must map module classes to gcfunc.Units, got {'Linear': Units(",
    ),
    "layers that do not fit": (
        lambda: gcfunc.select(MODEL, layers={nn.Linear: Units(dim=2)}),
        ValueError,
        "layers: Units(dim=2, groups=1) does not fit a weight of shape (2, 3)",
    ),
    "left out of params": (
        lambda: gcfunc.left_out(dict(MODEL.named_parameters())),  # type: ignore[arg-type]
        TypeError,
        "model must be a torch.nn.Module, got dict",
    ),
    "left out by an unknown rule": (
        lambda: gcfunc.left_out(MODEL, "conv"),
        ValueError,
        f"where must be one of {NAMES}, got 'conv'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_changes_nothing(name: str) -> None:
    require_refused(CASES[name])
