"""The projection, and where in a step it acts."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import gcfunc
from gcfunc import GC, Units
from gcfunc._catalog import CATALOG
from gcfunc._centralization.where import RULES
from tests.cases import (
    ALGORITHMS,
    GCS,
    Params,
    largest_difference,
    make_params,
    random_like,
)

SHAPES = [(3, 4), (1, 5), (4, 1), (3, 2, 3), (4, 3, 3, 2), (2, 3, 2, 1, 3)]
UNITS = [Units(), Units(groups=2), Units(dim=1), Units(dim=1, groups=2)]
ROUNDING = 1e-14


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def brute_force(g: Tensor, units: Units = UNITS[0]) -> Tensor:
    """Entry by entry: the entry less the mean over the entries of its unit."""
    members: dict[tuple[int, int], list[float]] = {}
    block = g.shape[0] // units.groups

    def unit(index: tuple[int, ...]) -> tuple[int, int]:
        # Within a group, dimension 0 starts again.
        group = index[0] // block
        return group, index[0] % block if units.dim == 0 else index[units.dim]

    indices = list(product(*map(range, g.shape)))
    for index in indices:
        members.setdefault(unit(index), []).append(float(g[index]))
    out = torch.empty_like(g)
    for index in indices:
        row = members[unit(index)]
        out[index] = float(g[index]) - math.fsum(row) / len(row)
    return out


def rows(g: Tensor) -> Tensor:
    return g.flatten(1).double()


def widen(tensors: Params) -> Params:
    return {name: t.float() for name, t in tensors.items()}


def selected(where: str, params: Params) -> set[str]:
    return {name for name in params if name in CHOSEN[where]}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...]) -> None:
    g = draw(*shape)
    out = gcfunc.centralize(g)
    torch.testing.assert_close(out, brute_force(g), rtol=0, atol=ROUNDING)
    assert float(rows(out).mean(1).abs().max()) <= ROUNDING


@pytest.mark.parametrize("units", UNITS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 2, 3, 2), (2, 3, 2, 1, 3)], ids=str)
def test_values_of_other_units(shape: tuple[int, ...], units: Units) -> None:
    g = draw(*shape)
    out = gcfunc.centralize(g, lambda name, tensor: units)
    torch.testing.assert_close(out, brute_force(g, units), rtol=0, atol=ROUNDING)
    if units == Units(dim=1, groups=2):
        halves = [gcfunc.centralize(half, lambda *_: Units(dim=1)) for half in g.chunk(2)]
        torch.testing.assert_close(out, torch.cat(halves), rtol=0, atol=ROUNDING)


def test_transposed_units_are_the_units_of_the_transpose() -> None:
    g = draw(3, 4, 2)
    out = gcfunc.centralize(g, lambda *_: Units(dim=1))
    expected = gcfunc.centralize(g.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("units", UNITS, ids=str)
def test_is_a_projection(units: Units) -> None:
    def project(g: Tensor) -> Tensor:
        out: Tensor = gcfunc.centralize(g, lambda *_: units)
        return out

    x, y = draw(4, 3, 2, seed=1), draw(4, 3, 2, seed=2)
    for a, b in (
        (project(2 * x - 3 * y), 2 * project(x) - 3 * project(y)),
        (project(project(x)), project(x)),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * ROUNDING)
    # Orthogonal: what it takes away is at right angles to what it leaves.
    assert abs(float(((x - project(x)) * project(y)).sum())) <= 100 * ROUNDING
    assert not torch.allclose(project(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    # A mean this far from zero would be off by many units of the last place in 16 bits.
    g = (8 + draw(6, 64, dtype=torch.float32)).to(dtype)
    out = gcfunc.centralize(g)
    assert out.dtype == dtype
    assert torch.equal(out, gcfunc.centralize(g.float()).to(dtype))
    assert not torch.equal(out, g - g.mean(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gc", GCS.values(), ids=GCS)
@pytest.mark.parametrize("build", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_step_in_sixteen_bits_is_rounded_once(
    build: Callable[..., Any], gc: GC | None, dtype: torch.dtype
) -> None:
    opt = build(gc)
    params = make_params(dtype)
    grads = random_like(params, 0)
    state = opt.init(params)
    expected, wide_state = opt.step(
        widen(params),
        widen(grads),
        state._replace(slots={s: widen(c) for s, c in state.slots.items()}),
    )
    new, state = opt.step(params, grads, state)
    for name, p in new.items():
        assert torch.equal(p, expected[name].to(dtype)), name
    for slot, column in state.slots.items():
        for name, t in column.items():
            assert torch.equal(t, wide_state.slots[slot][name].to(dtype)), (slot, name)


WHERES: dict[str, Callable[[Params], Any]] = {
    "gc": lambda params: "gc",
    "gcc": lambda params: "gcc",
    "linear": lambda params: "linear",
    "predicate": lambda params: lambda name, tensor: name.startswith("conv"),
    "bools": lambda params: {name: name == "linear.weight" for name in params},
    "units": lambda params: {
        name: Units(dim=1) if name == "linear.weight" else name == "conv2d.weight"
        for name in params
    },
}
CHOSEN = {
    "gc": {"conv2d.weight", "conv1d.weight", "depthwise.weight", "linear.weight"},
    "gcc": {"conv2d.weight", "depthwise.weight"},
    "linear": {"linear.weight"},
    "predicate": {"conv2d.weight", "conv1d.weight"},
    "bools": {"linear.weight"},
    "units": {"conv2d.weight", "linear.weight"},
}


@pytest.mark.parametrize("where", WHERES)
def test_selection(where: str) -> None:
    grads = random_like(make_params(), 0)
    before = {name: g.clone() for name, g in grads.items()}
    versions = {name: g._version for name, g in grads.items()}
    out = gcfunc.centralize(grads, WHERES[where](grads))
    assert list(out) == list(grads)
    for name, g in grads.items():
        assert torch.equal(g, before[name])
        assert g._version == versions[name]
        if name in CHOSEN[where]:
            wide = where == "units" and name == "linear.weight"
            expected = brute_force(g, Units(dim=1) if wide else Units())
            torch.testing.assert_close(out[name], expected, rtol=0, atol=ROUNDING)
            assert out[name].untyped_storage().data_ptr() != g.untyped_storage().data_ptr()
        else:
            assert out[name] is g


def test_predicates_and_bools_agree_in_nested_trees() -> None:
    tree = {"body": [draw(2, 3), draw(3)], "head": (draw(4, 2), {"w": draw(2, 2, 2)})}
    for where in (
        {"body": [True, False], "head": (False, {"w": True})},
        lambda name, tensor: name in ("body.0", "head.1.w"),
    ):
        out = gcfunc.centralize(tree, where)
        (weight, bias), (other, inner) = out["body"], out["head"]
        assert isinstance(out["head"], tuple)
        assert bias is tree["body"][1]
        assert other is tree["head"][0]
        for new, old in ((weight, draw(2, 3)), (inner["w"], draw(2, 2, 2))):
            torch.testing.assert_close(new, brute_force(old), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("where", RULES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_updates_have_zero_mean_rows(name: str, where: Any) -> None:
    """At the update, every displacement; lookahead's is a combination of such."""
    opt = ALGORITHMS[name](GC(where, at="update"))
    start = params = make_params()
    state = opt.init(params)
    chosen = selected(where, params)
    for t in range(4):
        params, state = opt.step(params, random_like(params, t), state)
        for leaf in chosen:
            moved = rows(params[leaf] - start[leaf])
            assert float(moved.abs().max()) > 1e-3
            assert float(moved.mean(1).abs().max()) <= ROUNDING, (t, leaf)


# The decay that joins the gradient.
COUPLED = {
    f"{name}-{variant}".rstrip("-"): options.get("weight_decay", 0.0)
    for name, row in CATALOG.items()
    for variant, options in row.variants.items()
    if row.decay == "coupled" and not options.get("decoupled_weight_decay")
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_at_the_gradient_the_algorithm_is_plain_otherwise(name: str) -> None:
    """A step with GC is a plain step on a gradient that was centralized by hand."""
    opt, plain = ALGORITHMS[name](GC("gc")), ALGORITHMS[name](None)
    a = b = make_params()
    state_a, state_b = opt.init(a), plain.init(b)
    decay = COUPLED.get(name, 0.0)
    for t in range(4):
        grads = random_like(a, t)
        centralized = {
            n: brute_force(g + decay * b[n]) - decay * b[n] for n, g in grads.items() if g.ndim > 1
        }
        a, state_a = opt.step(a, grads, state_a)
        b, state_b = plain.step(b, grads | centralized, state_b)
    assert largest_difference(a, b) <= 10 * ROUNDING


@pytest.mark.parametrize("name", ALGORITHMS)
def test_at_the_update_the_algorithm_is_plain_before(name: str) -> None:
    """A step with GC is a plain step whose displacement was centralized by hand."""
    opt, plain = ALGORITHMS[name](GC("gc", at="update")), ALGORITHMS[name](None)
    start = make_params()
    grads = random_like(start, 0)
    new, state = opt.step(start, grads, opt.init(start))
    expected, plain_state = plain.step(start, grads, plain.init(start))
    by_hand = {n: p + brute_force(expected[n] - p) for n, p in start.items() if p.ndim > 1}
    assert largest_difference(new, expected | by_hand) <= ROUNDING
    for slot in state.slots.keys() - {"slow_params"}:
        assert largest_difference(state.slots[slot], plain_state.slots[slot]) == 0


@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "sgd-nesterov"])
def test_gradient_is_enough_where_the_direction_is_linear(name: str) -> None:
    at_gradient, at_update = ALGORITHMS[name](GC("gc")), ALGORITHMS[name](GC("gc", at="update"))
    start = a = b = make_params()
    state_a, state_b = at_gradient.init(a), at_update.init(b)
    for t in range(4):
        grads = random_like(start, t)
        a, state_a = at_gradient.step(a, grads, state_a)
        b, state_b = at_update.step(b, grads, state_b)
        for leaf in selected("gc", start):
            assert float(rows(a[leaf] - start[leaf]).mean(1).abs().max()) <= ROUNDING
    assert largest_difference(a, b) <= ROUNDING


def test_gradient_is_not_the_update_where_it_is_not() -> None:
    params = make_params()
    grads = random_like(params, 0)
    opt = ALGORITHMS["adam"](GC("gc"))
    new, _ = opt.step(params, grads, opt.init(params))
    assert float(rows(new["linear.weight"] - params["linear.weight"]).mean(1).abs().max()) > 1e-4


@pytest.mark.parametrize("gc", ["gc", "gcc", "gc2", "gcc2"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_differs_from_plain_exactly_where_selected(name: str, gc: str) -> None:
    start = make_params()
    chosen = selected(gc.rstrip("2"), start)
    ends: list[Params] = []
    for choice in (GCS[gc], None):
        opt, params = ALGORITHMS[name](choice), start
        state = opt.init(params)
        for t in range(3):
            params, state = opt.step(params, random_like(params, t), state)
        ends.append(params)
    centralized, plain = ends
    for leaf in start:
        if leaf in chosen:
            assert float((centralized[leaf] - plain[leaf]).abs().max()) > 1e-4, leaf
        else:
            assert torch.equal(centralized[leaf], plain[leaf]), leaf


@pytest.mark.parametrize(
    ("build", "at", "centralized"),
    [
        (gcfunc.sgd, "gradient", True),
        (gcfunc.sgd, "update", True),
        (gcfunc.sgdw, "gradient", False),
        (gcfunc.sgdw, "update", True),
        (gcfunc.adamw, "gradient", False),
        (gcfunc.adamw, "update", True),
    ],
)
def test_which_decay_is_centralized(
    build: Callable[..., gcfunc.Optimizer], at: Any, centralized: bool
) -> None:
    """With gradients of zero, the update is the decay alone."""
    w = draw(3, 4)
    opt = build(lr=0.5, weight_decay=0.1, gc=GC("gc", at=at))
    new, _ = opt.step(w, torch.zeros_like(w), opt.init(w))
    decay = 0.1 * w
    expected = w - 0.5 * (brute_force(decay) if centralized else decay)
    torch.testing.assert_close(new, expected, rtol=0, atol=ROUNDING)


def test_coupled_decay_is_centralized_before_the_moments() -> None:
    w, g = draw(3, 4, seed=1), draw(3, 4, seed=2)
    opt = gcfunc.adam(weight_decay=0.1, gc="gc")
    _, state = opt.step(w, g, opt.init(w))
    expected = 0.1 * brute_force(g + 0.1 * w)
    torch.testing.assert_close(state.slots["exp_avg"]["param"], expected, rtol=0, atol=ROUNDING)


def test_vectors_are_left_out_whatever_where_says() -> None:
    tree = {"weight": torch.tensor([[1.0, 3.0]]), "bias": torch.tensor([1.0, 3.0])}
    for where in ({"weight": True, "bias": True}, lambda name, tensor: True):
        new = gcfunc.centralize(tree, where)
        assert new["weight"].tolist() == [[-1.0, 1.0]]
        assert new["bias"] is tree["bias"]
