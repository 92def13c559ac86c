"""Nothing is exported that has no row in the catalogue, and no row is half filled in."""

import inspect

import pytest
import torch

import gcfunc
from gcfunc import optim
from gcfunc._catalog import CATALOG, Algorithm
from gcfunc.optim.base import DropIn

COMBINING = {"partition", "no_decay", "layerwise_lr"}
"""They make one optimizer of others."""
KINDS = ("Optimizer", gcfunc.Optimizer)
"""How functions say that they return one, whether or not their module keeps annotations as text."""


def drop_ins(cls: type) -> set[type]:
    """All classes derived from one that the library itself has."""
    found: set[type] = {cls}
    below: list[type] = cls.__subclasses__()
    found = found.union(*map(drop_ins, below))
    return {kind for kind in found if kind.__module__.startswith("gcfunc.")}


def test_every_constructor_has_a_row() -> None:
    functions = {n: f for n in gcfunc.__all__ if inspect.isfunction(f := getattr(gcfunc, n))}
    made = {n for n, f in functions.items() if f.__annotations__["return"] in KINDS}
    assert made == {*CATALOG} | COMBINING


def test_every_class_has_a_row() -> None:
    inside = {kind.__name__ for kind in drop_ins(DropIn) if not kind.__name__.startswith("_")}
    rows = {row.drop_in.__name__ for row in CATALOG.values()}
    reference = [name for row in CATALOG.values() for name in row.reference]
    assert inside - {"DropIn"} == rows | {*reference} == {*optim.__all__}
    assert len(reference) == len({*reference})


@pytest.mark.parametrize("name", CATALOG)
def test_a_row_is_whole(name: str) -> None:
    row = CATALOG[name]
    assert row.constructor is getattr(gcfunc, name)
    assert row.drop_in.__name__.lower() == name
    given = {option for options in row.variants.values() for option in options}
    own = {*inspect.signature(row.constructor).parameters} - {"inner", "gc"}
    # So that each is on somewhere.
    assert own <= given | {*row.options}
    assert {option for option in own if option in row.training} == {*row.training} or row.around
    if row.twin:
        # All of torch's, but for how it computes them.
        theirs = {*inspect.signature(row.twin).parameters}
        how = {"foreach", "maximize", "capturable", "differentiable", "fused"}
        of_the_class = {"decoupled_weight_decay"} if name == "adam" else set()
        assert own - {"lr"} == {*row.options}
        assert own >= theirs - how - of_the_class - {"params"}
        assert "fused" in theirs or row.nearest_fused, "torch has no fused step: what is nearest?"
    else:
        assert row.nearest in CATALOG
        assert CATALOG[row.nearest].twin
    fused = CATALOG[row.nearest_fused or row.nearest or name].twin
    assert fused
    assert "fused" in inspect.signature(fused).parameters


def displacement(row: Algorithm, shift: float) -> torch.Tensor:
    """What decay alone does, with GC, to weights that all are larger by so much."""
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4) + shift
    opt = row.make(gc="gc", lr=0.1, weight_decay=0.1)
    new, _ = opt.step(weight, torch.zeros_like(weight), opt.init(weight))
    moved: torch.Tensor = new - weight
    return moved


@pytest.mark.parametrize("name", CATALOG)
def test_decay_is_what_the_row_says(name: str) -> None:
    """Coupled, it is centralized with the gradient, and so knows nothing of a row's mean."""
    row = CATALOG[name]
    difference = float((displacement(row, 0.0) - displacement(row, 1.0)).abs().max())
    assert (difference < 1e-6) == (row.decay == "coupled"), row.decay


@pytest.mark.parametrize("name", CATALOG)
def test_gc_makes_a_difference(name: str) -> None:
    """As a line of defence for everything that is made from a row."""
    row = CATALOG[name]
    params = {"weight": torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)}
    grads = {"weight": torch.linspace(0.1, 2, 12, dtype=torch.float64).view(3, 4)}
    for options in row.variants.values():
        moved = {}
        for gc in (None, "gc"):
            opt = row.make(gc=gc, **options)
            moved[gc] = opt.step(params, grads, opt.init(params))[0]["weight"]
        assert float((moved[None] - moved["gc"]).abs().max()) > 1e-4
