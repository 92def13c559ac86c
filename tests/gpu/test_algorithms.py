"""Every algorithm, stepped in every way there is, against its eager float64 step on the CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import gcfunc
from gcfunc._catalog import CATALOG
from tests.cases import ALGORITHMS, Params
from tests.gpu.cases import (
    BACKWARD,
    LR,
    STEPS,
    UPDATE,
    expected,
    gradients,
    moved,
    require,
    slower,
    stepped,
    weights,
)

ROWS = {name: next(iter(row.variants.values())) for name, row in CATALOG.items()}
"""Each algorithm with its first set of options."""
AT = {"gc": BACKWARD, "at the update": UPDATE}


def donated(opt: Any, params: Params, batches: Sequence[Params]) -> Params:
    return stepped(gcfunc.compile(opt), params, batches, slower)


def packed(opt: Any, params: Params, batches: Sequence[Params]) -> Params:
    own = gcfunc.pack(params)
    packed_batches = [gcfunc.pack(grads, like=own) for grads in batches]
    return stepped(gcfunc.compile(opt), own, packed_batches, slower)


def pure(opt: Any, params: Params, batches: Sequence[Params]) -> Params:
    return stepped(gcfunc.compile(opt, donate=False), params, batches, slower)


def not_compiled(opt: Any, params: Params, batches: Sequence[Params]) -> Params:
    return stepped(opt, params, batches, slower)


def on_device(device: str) -> tuple[Params, list[Params], Params, list[Params]]:
    """Weights and gradients on the CPU, then both on the device."""
    start = weights()
    batches = [gradients(start, seed) for seed in range(STEPS)]
    return start, batches, moved(start, device), [moved(g, device) for g in batches]


def require_equal(
    step: Callable[..., Params], build: Callable[..., Any], gc: Any, device: str
) -> None:
    start, batches, own, own_batches = on_device(device)
    want, without = (expected(build(choice), start, batches, slower) for choice in (gc, None))
    require(step(build(gc), own, own_batches), want, without)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_donated(name: str, device: str) -> None:
    require_equal(donated, ALGORITHMS[name], BACKWARD, device)


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "ranger"])
def test_donated_at_the_update(name: str, device: str) -> None:
    require_equal(donated, ALGORITHMS[name], UPDATE, device)


@pytest.mark.parametrize("name", ROWS)
def test_packed(name: str, device: str) -> None:
    require_equal(packed, lambda gc: CATALOG[name].make(gc=gc, **ROWS[name]), BACKWARD, device)


@pytest.mark.parametrize("name", ROWS)
def test_drop_in(name: str, device: str) -> None:
    row, options = CATALOG[name], ROWS[name]
    start, batches, own, own_batches = on_device(device)
    want, without = (
        expected(row.make(gc=gc, **options), start, batches, slower) for gc in (BACKWARD, None)
    )
    params = {name: nn.Parameter(p) for name, p in own.items()}
    optimizer = row.make_drop_in(params.items(), **options, gc=BACKWARD, compile=True)
    for t, grads in enumerate(own_batches):
        if t == len(batches) // 2:
            optimizer.param_groups[0]["lr"] = LR
        for key, p in params.items():
            p.grad = grads[key]
        optimizer.step()
    require({key: p.detach().cpu().double() for key, p in params.items()}, want, without)


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_not_compiled(name: str, at: str, device: str) -> None:
    require_equal(not_compiled, ALGORITHMS[name], AT[at], device)


@pytest.mark.parametrize("name", ROWS)
def test_pure(name: str, device: str) -> None:
    require_equal(pure, lambda gc: CATALOG[name].make(gc=gc, **ROWS[name]), BACKWARD, device)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_tree_may_mix_devices(name: str, device: str) -> None:
    def spread(tree: Params) -> Params:
        return {key: t.to(("cpu", device)[i % 2]) for i, (key, t) in enumerate(tree.items())}

    start = weights(torch.float64)
    batches = [gradients(start, seed) for seed in range(STEPS)]
    params, grads = spread(start), [spread(g) for g in batches]
    opt = ALGORITHMS[name](BACKWARD)
    state = opt.init(params)
    for key, t in params.items():
        slots = [values[key] for values in state.slots.values() if key in values]
        assert {s.device for s in slots} <= {t.device}
    want, without = (expected(ALGORITHMS[name](gc), start, batches) for gc in (BACKWARD, None))
    require(stepped(opt, params, grads), want, without, 1e-12)
