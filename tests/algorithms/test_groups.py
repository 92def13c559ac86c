"""Parameter groups, and their functional twins."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gcfunc
from tests.cases import largest_difference


class Model(nn.Module):
    """An embedding, blocks, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        out: Tensor = self.head(self.norm(x))
        return out


def make() -> Model:
    torch.manual_seed(0)
    return Model().double()


def trained(groups: list[dict[str, Any]], model: nn.Module, gc: Any) -> dict[str, Tensor]:
    """After three steps of the drop-in."""
    opt = gcfunc.optim.AdamW(groups, lr=0.01, gc=gc, compile=False)
    for _ in range(3):
        opt.zero_grad()
        loss(model).backward()
        opt.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.arange(5)).square().sum()
    return out


def stepped(opt: gcfunc.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The same by a functional optimizer."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    state = opt.init(params)
    for _ in range(3):
        grads = torch.func.grad(
            lambda p: torch.func.functional_call(model, p, torch.arange(5)).square().sum()
        )(params)
        params, state = opt.step(params, grads, state)
    return params


Twins = tuple[
    Callable[[nn.Module], list[dict[str, Any]]], Callable[[nn.Module, Any], gcfunc.Optimizer]
]
TWINS: dict[str, Twins] = {
    "no decay": (
        lambda model: gcfunc.no_decay_groups(model, 0.1),
        lambda model, gc: gcfunc.no_decay(
            gcfunc.adamw, dict(model.named_parameters()), 0.1, lr=0.01, gc=gc
        ),
    ),
    "layerwise lr": (
        lambda model: gcfunc.layerwise_lr_groups(model, 0.1, 0.5),
        lambda model, gc: gcfunc.layerwise_lr(gcfunc.adamw, model, 0.1, 0.5, gc=gc),
    ),
}


@pytest.mark.parametrize("twins", TWINS)
def test_twins_are_equal(twins: str) -> None:
    groups, functional = TWINS[twins]
    results = {}
    for gc in (None, "gc"):
        model = make()
        want = stepped(functional(model, gc), model)
        results[gc] = trained(groups(model), model, gc)
        assert largest_difference(results[gc], want) <= 1e-12
    assert largest_difference(results[None], results["gc"]) > 1e-4
    ordinary = make()
    alike = [{"params": ordinary.parameters()}]
    assert largest_difference(trained(alike, ordinary, "gc"), results["gc"]) > 1e-4


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def test_no_decay() -> None:
    model = make()
    decay, rest = names(gcfunc.no_decay_groups(model, 0.1))
    assert decay == ["embed.weight", *(f"blocks.{i}.weight" for i in range(3)), "head.weight"]
    assert {*decay, *rest} == {name for name, _ in model.named_parameters()}
    groups = gcfunc.no_decay_groups(model, 0.1, skip=lambda name, p: p.ndim < 2 or "embed" in name)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1]
    assert "embed.weight" in names(groups)[0]
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    assert names(gcfunc.no_decay_groups(model, 0.1)) == [["head.weight"], ["head.bias"]]


def test_layerwise() -> None:
    groups = gcfunc.layerwise_lr_groups(make(), lr=1.0, decay=0.5)
    assert [group["lr"] for group in groups] == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert names(groups)[0] == ["embed.weight"]
    assert names(groups)[2] == ["blocks.1.weight", "blocks.1.bias"]
    assert names(groups)[-1] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    named = gcfunc.layerwise_lr_groups(make(), 1.0, 0.5, layers=["embed", "blocks", "head"])
    assert [group["lr"] for group in named] == [0.125, 0.25, 0.5, 1.0]
    assert names(named)[-1] == ["norm.weight", "norm.bias"]  # after the first layer, in none
    even = gcfunc.layerwise_lr_groups(make(), 1.0, 1.0)
    assert [group["lr"] for group in even] == [1.0]


def frozen() -> Model:
    model = make()
    model.requires_grad_(False)
    return model


def params() -> dict[str, Tensor]:
    return dict(make().named_parameters())


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no module": (
        lambda: gcfunc.no_decay_groups([], 0.1),  # type: ignore[arg-type]
        TypeError,
        "model must be a torch.nn.Module, got list",
    ),
    "negative decay": (lambda: gcfunc.no_decay_groups(make(), -1.0), ValueError, "weight_decay"),
    "frozen": (
        lambda: gcfunc.layerwise_lr_groups(frozen(), 0.1, 0.5),
        ValueError,
        "no parameters to train",
    ),
    "decay of 0": (
        lambda: gcfunc.layerwise_lr_groups(make(), 0.1, 0.0),
        ValueError,
        r"decay must be in \(0, 1\], got 0.0",
    ),
    "negative lr": (lambda: gcfunc.layerwise_lr_groups(make(), -0.1, 0.5), ValueError, "lr"),
    "unknown layer": (
        lambda: gcfunc.layerwise_lr_groups(make(), 0.1, 0.5, layers=["block"]),
        ValueError,
        "layers: the model has no parameters under 'block'",
    ),
    "no layers": (
        lambda: gcfunc.layerwise_lr_groups(nn.Linear(2, 2), 0.1, 0.5),
        ValueError,
        "name them by layers=",
    ),
    "nothing to centralize": (
        lambda: gcfunc.no_decay(gcfunc.adamw, params(), 0.1, gc="gcc"),
        ValueError,
        "selects none of the parameters",
    ),
    "a mask that lacks one": (
        lambda: gcfunc.no_decay(
            gcfunc.adamw, params(), 0.1, gc=gcfunc.GC(where={"embed.weight": True})
        ),
        ValueError,
        "the mask has no 'blocks.0.weight'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
