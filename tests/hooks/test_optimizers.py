"""Gradients arrive centralized, whatever takes them: clipping, scalers, optimizers."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gcfunc
from gcfunc.hooks import centralize_backward
from tests.cases import largest_difference
from tests.distributed import gradients, require_same
from tests.hooks.cases import X, loss_of, mlp

pytestmark = pytest.mark.usefixtures("seeded")


def test_clipping_comes_after() -> None:
    model = mlp()
    plain, clipped_first = copy.deepcopy(model), copy.deepcopy(model)
    centralize_backward(model)
    for m in (model, plain, clipped_first):
        loss_of(m, X[0]).backward()
    for name, g in gcfunc.centralize(gradients(plain)).items():
        plain.get_parameter(name).grad = g
    norms = [
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (model, plain, clipped_first)
    ]
    assert abs(norms[0] - norms[1]) < 1e-12
    assert norms[2] - norms[0] > 1e-3
    require_same(gradients(model), gradients(plain))
    assert largest_difference(gradients(model), gcfunc.centralize(gradients(clipped_first))) > 1e-6


def test_grad_scaler_skips_what_overflows() -> None:
    """GC of what is not finite is not finite, and GC of the rest knows no scale."""

    def train(model: nn.Module, project: Callable[[Any], Any]) -> tuple[dict[str, Tensor], float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step, x in enumerate(X):
            optimizer.zero_grad()
            before = [p.clone() for p in model.parameters()]
            scaler.scale(loss_of(model, x * (torch.inf if step == 1 else 1))).backward()
            scaler.unscale_(optimizer)
            for p, g in zip(
                model.parameters(), project([p.grad for p in model.parameters()]), strict=True
            ):
                p.grad = g
            scaler.step(optimizer)
            scaler.update()
            same = [*map(torch.equal, before, model.parameters())]
            assert all(same) if step == 1 else not any(same)
        return {n: p.detach() for n, p in model.named_parameters()}, scaler.get_scale()

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    plain, manual = copy.deepcopy(model), copy.deepcopy(model)
    want, scale = train(manual, gcfunc.centralize)
    without, _ = train(plain, lambda grads: grads)
    centralize_backward(model)
    have, have_scale = train(model, lambda grads: grads)
    assert have_scale == scale == 2.0**7
    require_same(have, want)
    assert largest_difference(have, without) > 1e-3


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Any]] = {
    "SGD": (partial(torch.optim.SGD, lr=0.1), gcfunc.sgd(0.1, gc="gc")),
    "momentum": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.3),
        gcfunc.sgd(0.1, 0.9, 0.3, gc="gc"),
    ),
    "nesterov": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        gcfunc.sgd(0.1, 0.9, nesterov=True, gc="gc"),
    ),
    "Adam": (partial(torch.optim.Adam, lr=0.01), gcfunc.adam(0.01, gc="gc")),
    "amsgrad": (
        partial(torch.optim.Adam, lr=0.01, amsgrad=True),
        gcfunc.adam(0.01, amsgrad=True, gc="gc"),
    ),
    "AdamW": (
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        gcfunc.adamw(0.01, weight_decay=0.1, gc="gc"),
    ),
    "Adagrad": (partial(torch.optim.Adagrad, lr=0.1), gcfunc.adagrad(0.1, gc="gc")),
    "RAdam": (partial(torch.optim.RAdam, lr=0.01), gcfunc.radam(0.01, gc="gc")),
    "RAdam, decoupled": (
        partial(torch.optim.RAdam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
        gcfunc.radam(0.01, weight_decay=0.1, decoupled_weight_decay=True, gc="gc"),
    ),
    "RMSprop": (partial(torch.optim.RMSprop, lr=0.01), None),
    "NAdam": (partial(torch.optim.NAdam, lr=0.01), None),
    "Adamax": (partial(torch.optim.Adamax, lr=0.01), None),
}
# With betas as they are RAdam rectifies from the sixth step on.
STEPS = 10


def train(
    model: nn.Module,
    build: Callable[..., torch.optim.Optimizer],
    change: Callable[[Any, Any], Any] = lambda params, grads: grads,
) -> dict[str, Tensor]:
    """The parameters after some steps, gradients changed after backward."""
    params = dict(model.named_parameters())
    optimizer = build(params.values())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, X[step % len(X)]).backward()
        for name, g in change(params, {n: p.grad for n, p in params.items()}).items():
            params[name].grad = g
        optimizer.step()
    return {n: p.detach() for n, p in params.items()}


def train_functionally(model: nn.Module, opt: gcfunc.Optimizer) -> dict[str, Tensor]:
    params = {n: p.detach() for n, p in model.named_parameters()}
    state = opt.init(params)
    for step in range(STEPS):
        x = X[step % len(X)]
        grads = torch.func.grad(
            lambda params, x: loss_of(lambda x: functional_call(model, params, x), x)  # type: ignore[arg-type]
        )(params, x)
        params, state = opt.step(params, grads, state)
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_functional_steps(name: str) -> None:
    build, functional = OPTIMIZERS[name]
    model = mlp()
    without = train(copy.deepcopy(model), build)
    want = train(copy.deepcopy(model), build, lambda params, grads: gcfunc.centralize(grads))
    if functional is not None:
        require_same(want, train_functionally(model, functional))
    centralize_backward(model)
    have = train(model, build)
    require_same(have, want)
    assert largest_difference(have, without) > 1e-3


COUPLED: dict[str, tuple[Callable[..., torch.optim.Optimizer], Any]] = {
    "SGD": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        gcfunc.sgd(0.1, 0.9, 0.0, 0.1, gc="gc"),
    ),
    "Adam": (partial(torch.optim.Adam, lr=0.01), gcfunc.adam(0.01, weight_decay=0.1, gc="gc")),
    "Adagrad": (
        partial(torch.optim.Adagrad, lr=0.1),
        gcfunc.adagrad(0.1, weight_decay=0.1, gc="gc"),
    ),
    "RAdam": (partial(torch.optim.RAdam, lr=0.01), gcfunc.radam(0.01, weight_decay=0.1, gc="gc")),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_decay_is_not_centralized(name: str) -> None:
    """As documented: a functional step centralizes it too."""
    build, functional = COUPLED[name]
    model = mlp()
    all_centralized = train_functionally(model, functional)
    want = train(
        copy.deepcopy(model),
        build,
        lambda params, grads: {
            n: g + 0.1 * params[n].detach() for n, g in gcfunc.centralize(grads).items()
        },
    )
    centralize_backward(model)
    have = train(model, partial(build, weight_decay=0.1))
    require_same(have, want)
    assert largest_difference(have, all_centralized) > 1e-4
