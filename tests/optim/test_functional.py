"""With GC the drop-ins are the functional steps, lookahead and Ranger too."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gcfunc
from gcfunc import GC, optim
from gcfunc._catalog import CATALOG, Algorithm
from tests.cases import largest_difference, random_like
from tests.optim.training import (
    EXACT,
    Options,
    copies,
    difference,
    kind_of,
    leaves,
    set_grads,
    train,
    values,
)

# Every class, with all of its options on somewhere.
KINDS: dict[str, tuple[Algorithm, Options]] = {
    kind_of(row, variant): (row, {**options})
    for row in CATALOG.values()
    for variant, options in row.variants.items()
}
WITH: dict[str, Any] = {
    "gc": "gc",
    "gcc": "gcc",
    "at the update": GC("gc", at="update"),
    "a predicate": GC(lambda name, p: name == "linear.weight"),
    "a mask": GC({name: "linear" in name for name in leaves()}),
    "units": GC(lambda name, p: name == "linear.weight" and gcfunc.Units(dim=1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gc", WITH.values(), ids=WITH.keys())
def test_equals_the_functional_step(gc: Any, kind: str) -> None:
    row, options = KINDS[kind]
    start = leaves()
    results = []
    for choice in (gc, None):
        own = copies(start)
        train(row.make_drop_in(own.items(), **options, gc=choice), own, range(6))
        results.append(own)
    opt = row.make(gc=gc, **options)
    params = {n: p.detach() for n, p in start.items()}
    state = opt.init(params)
    for seed in range(6):
        params, state = opt.step(params, random_like(params, seed), state)
    with torch.no_grad():
        assert largest_difference(params, results[0]) <= EXACT
        assert largest_difference(params, results[1]) > 1e-4


@pytest.mark.parametrize(("kind", "compiled"), [("SGD", True), *((kind, False) for kind in KINDS)])
def test_narrower_gradients_are_widened(kind: str, compiled: bool) -> None:
    """Of a parameter that takes them, as ``grad_dtype`` tells; wider ones do not fit."""
    row, options = KINDS[kind]
    results = []
    for narrow in (True, False):
        params = leaves(torch.float32)
        opt = row.make_drop_in(params.items(), **options, gc="gc", compile=compiled)
        for seed in range(3):
            set_grads(params, seed)
            for p in params.values():
                assert p.grad is not None
                rounded = p.grad.bfloat16()
                if narrow:
                    p.grad = None
                    p.grad_dtype = torch.bfloat16
                p.grad = rounded if narrow else rounded.float()
            opt.step()
            for p in params.values():
                p.grad = None
                p.grad_dtype = torch.float32
        results.append(values(opt))
    assert difference(*results) == 0
    p.grad_dtype, p.grad = torch.float64, torch.ones_like(p, dtype=torch.float64)
    before = values(opt)
    with pytest.raises(ValueError, match=r"has dtype torch\.float64, but its parameter"):
        opt.step()
    assert difference(values(opt), before) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_never_written(kind: str) -> None:
    row, options = KINDS[kind]
    params = leaves()
    opt = row.make_drop_in(params.values(), **options | {"weight_decay": 0.1}, gc="gc")
    start = values(opt)
    for group in opt.param_groups:
        group["maximize"] = True
    for seed in range(3):
        set_grads(params, seed)
        given = {name: p.grad for name, p in params.items()}
        versions = [g._version for g in given.values() if g is not None]
        opt.step()
        assert all(p.grad is given[name] for name, p in params.items())
        assert versions == [g._version for g in given.values() if g is not None]
        want = random_like(params, seed)
        assert all(torch.equal(g, want[name]) for name, g in given.items() if g is not None)
    assert difference(values(opt), start) > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("Ranger", "Lookahead")])
def test_lookahead_equals_the_functional_one(kind: str) -> None:
    row, options = KINDS[kind]
    params = leaves()
    inner = row.make_drop_in(params.values(), **options, gc="gc")
    opt = train(optim.Lookahead(inner, k=3, alpha=0.7), params, range(7))
    functional = gcfunc.lookahead(row.make(gc="gc", **options), k=3, alpha=0.7)
    want = {n: p.detach() for n, p in leaves().items()}
    state = functional.init(want)
    for seed in range(7):
        want, state = functional.step(want, random_like(want, seed), state)
    assert difference(values(opt), [*want.values()]) <= EXACT
    slow = [entry["slow_params"] for entry in opt.state.values()]
    assert difference(slow, [*state.slots["slow_params"].values()]) <= EXACT
    assert difference(slow, values(opt)) > 1e-4


def test_two_options_called_alpha() -> None:
    """RMSprop's keeps its name, and Lookahead's gets another."""
    params, same = leaves(), leaves()
    inner = optim.RMSprop(params.values(), lr=0.1, alpha=0.9)
    opt = optim.Lookahead(inner, k=2, alpha=0.25)
    (group,) = opt.param_groups
    assert (group["alpha"], group["lookahead_alpha"]) == (0.9, 0.25)
    slow = values(opt)
    theirs = torch.optim.RMSprop(same.values(), lr=0.1, alpha=0.9)
    for seed in range(6):
        if seed == 3:
            group["lookahead_alpha"] = 0.5
            theirs.param_groups[0]["alpha"] = group["alpha"] = 0.8
        train(opt, params, [seed])
        train(theirs, same, [seed])
        if seed % 2:
            share = 0.5 if seed >= 3 else 0.25
            slow = [s + share * (p - s) for s, p in zip(slow, values(theirs), strict=True)]
            with torch.no_grad():
                for p, s in zip(same.values(), slow, strict=True):
                    p.copy_(s)
        assert difference(values(opt), values(theirs)) <= EXACT


def plain_lion(params: list[Tensor], grads: list[list[Tensor]]) -> None:
    """Lion as its paper has it: lr 0.1, betas 0.8 and 0.95, decay 0.5."""
    momenta = [torch.zeros_like(p) for p in params]
    for step in grads:
        for p, m, g in zip(params, momenta, step, strict=True):
            update = (0.8 * m + 0.2 * g).sign()
            m.mul_(0.95).add_(g, alpha=0.05)
            p.sub_(0.1 * (update + 0.5 * p))


@pytest.mark.parametrize("maximize", [False, True])
def test_lion_is_its_paper(maximize: bool) -> None:
    params, same = leaves(), [p.detach() for p in leaves().values()]
    opt = optim.Lion(params.values(), 0.1, (0.8, 0.95), 0.5, maximize=maximize)
    train(opt, params, range(50))
    grads = [[*random_like(params, seed).values()] for seed in range(50)]
    plain_lion(same, [[-g for g in step] for step in grads] if maximize else grads)
    assert difference(values(opt), same) <= EXACT


def test_lookahead_goes_on_where_its_inner_optimizer_was() -> None:
    params = leaves()
    inner = optim.Adam(params.values(), lr=0.1, gc="gc")
    train(inner, params, range(2))
    opt = train(optim.Lookahead(inner, k=3, alpha=0.7), params, range(2, 7))
    functional = gcfunc.adam(0.1, gc="gc")
    want = {n: p.detach() for n, p in leaves().items()}
    state = functional.init(want)
    for seed in range(7):
        if seed == 2:
            functional = gcfunc.lookahead(functional, k=3, alpha=0.7)
            start = functional.init(want)
            slots = {**start.slots, **state.slots}
            state = start._replace(step=state.step, slots=slots)
        want, state = functional.step(want, random_like(want, seed), state)
    assert difference(values(opt), [*want.values()]) <= EXACT


def test_ranger_is_lookahead_over_radam() -> None:
    """With Ranger's defaults."""
    params, same = leaves(), leaves()
    train(optim.Ranger(params.values(), gc="gc"), params, range(13))
    inner = optim.RAdam(
        same.values(), 1e-3, (0.95, 0.999), 1e-5, decoupled_weight_decay=True, gc="gc"
    )
    train(optim.Lookahead(inner, k=6, alpha=0.5), same, range(13))
    assert difference([*params.values()], [*same.values()]) <= EXACT
