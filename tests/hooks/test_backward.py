"""Gradients arrive centralized, however they are computed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gcfunc
from gcfunc.hooks import centralize_backward
from tests.cases import largest_difference
from tests.distributed import gradients, require_same
from tests.hooks.cases import Run, X, loss_of, mlp, require_centralized, require_different

pytestmark = pytest.mark.usefixtures("seeded")


def accumulated(model: nn.Module) -> None:
    for x in X:
        loss_of(model, x).backward()


def zeroed(model: nn.Module, set_to_none: bool) -> None:
    for x in X:
        model.zero_grad(set_to_none)
        loss_of(model, x).backward()


def retained(model: nn.Module) -> None:
    loss = loss_of(model, X[0])
    loss.backward(retain_graph=True)
    loss.backward()


def asked_for(model: nn.Module) -> None:
    """By torch.autograd.grad, which leaves ``.grad`` alone."""
    params = [*model.parameters()]
    grads = torch.autograd.grad(loss_of(model, X[0]), params)
    assert all(p.grad is None for p in params)
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def autocast(model: nn.Module) -> None:
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, X[0].float())
    loss.backward()


def checkpointed(model: nn.Module, use_reentrant: bool) -> None:
    x = X[0].clone().requires_grad_()  # the reentrant kind wants that
    loss_of(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x).backward()  # type: ignore[arg-type]


def frozen_for_a_while(model: nn.Module) -> None:
    weight = model.get_parameter("0.weight")
    weight.requires_grad_(False)
    loss_of(model, X[0]).backward()
    assert weight.grad is None
    weight.requires_grad_(True)
    loss_of(model, X[1]).backward()


def only_inputs_of(model: nn.Module) -> None:
    """A backward pass for some of the parameters."""
    loss_of(model, X[0]).backward(inputs=[model.get_parameter("2.weight")])


def stepped(model: nn.Module) -> None:
    """In-place changes of a parameter leave its hooks alone."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for x in X:
        loss_of(model, x).backward()
        optimizer.step()


RUNS: dict[str, Run] = {
    "accumulated": accumulated,
    "zeroed to None": partial(zeroed, set_to_none=True),
    "zeroed in place": partial(zeroed, set_to_none=False),
    "retained graph": retained,
    "autograd.grad": asked_for,
    "autocast": autocast,
    "checkpointed": partial(checkpointed, use_reentrant=False),
    "checkpointed, reentrant": partial(checkpointed, use_reentrant=True),
    "frozen for a while": frozen_for_a_while,
    "inputs": only_inputs_of,
    "in-place steps": stepped,
}


@pytest.mark.parametrize("run", RUNS)
def test_ways_to_compute_gradients(run: str) -> None:
    require_centralized(mlp(), RUNS[run])


def test_frozen_when_registered() -> None:
    model, plain = mlp().requires_grad_(False), mlp()
    plain.load_state_dict(model.state_dict())
    handle = centralize_backward(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert handle.names == ("0.weight", "2.weight")
    model.requires_grad_(True)
    for m in (model, plain):
        loss_of(m, X[0]).backward()
    require_same(gradients(model), gcfunc.centralize(gradients(plain)))
    require_different(gradients(plain), gradients(model), handle.names)


def test_gradient_penalty() -> None:
    """Second derivatives go through the projection, and arrive projected."""

    def penalty(model: nn.Module, project: Callable[[Any], Any]) -> dict[str, Tensor]:
        names, params = zip(*model.named_parameters(), strict=True)
        loss = loss_of(model, X[0])
        first = torch.autograd.grad(loss, params, create_graph=True)
        grads = project(dict(zip(names, first, strict=True)))
        total = loss + sum(g.square().sum() for g in grads.values())
        return project(dict(zip(names, torch.autograd.grad(total, params), strict=True)))

    def as_it_is(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return grads

    model = mlp()
    want, without = penalty(model, gcfunc.centralize), penalty(model, as_it_is)
    centralize_backward(model)
    have = penalty(model, as_it_is)
    require_same(have, want)
    # Not what centralizing at the end alone would give.
    assert largest_difference(gcfunc.centralize(without), want) > 1e-3


class NoneForWeight(torch.autograd.Function):
    """Uses a weight, and gives no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_functions_that_give_no_gradient() -> None:
    model = nn.Linear(3, 2)
    centralize_backward(model)
    x = torch.randn(4, 3, requires_grad=True)
    NoneForWeight.apply(x, model.weight).sum().backward()
    assert model.weight.grad is None
    assert x.grad is not None
