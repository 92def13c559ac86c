"""``gc`` as an option of each group, and whose names the parameters have."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gcfunc
from gcfunc import GC, optim
from tests.cases import random_like
from tests.optim.training import EXACT, Options, difference, leaves, train, values


class Net(nn.Module):
    """Of what select tells apart: an embedding, a transposed convolution, a norm, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.up = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(self.embedding(x).transpose(1, 2))
        return self.out(torch.tanh(self.norm(up)).transpose(1, 2))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def run(model: Net, opt: Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        x = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(seed))
        opt.zero_grad()
        (model(x) ** 2).sum().backward()
        opt.step()


def test_named_parameters_and_a_mask_from_the_modules() -> None:
    """One mask for all groups, each of which has a part of the names."""
    model, other = net(), net()
    mask = gcfunc.select(model)
    assert mask["up.weight"] == gcfunc.Units(1, 2)
    named = [*model.named_parameters()]
    groups: list[Options] = [{"params": named[:3]}, {"params": named[3:], "lr": 0.02}]
    run(model, optim.SGD(groups, lr=0.01, momentum=0.9, gc=GC(mask)))

    params = [*other.parameters()]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
    plain = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    with gcfunc.hooks.centralize_backward(other, where=mask):
        run(other, plain)
    third = net()
    run(third, optim.SGD(third.named_parameters(), lr=0.01, momentum=0.9))
    results = [[*each.parameters()] for each in (model, other, third)]
    assert difference(*results[:2]) <= EXACT
    assert difference(*results[1:]) > 1e-4


def test_groups_choose_their_gc() -> None:
    """The default, another one, none; biases alone are no mistake."""
    params, same = leaves(), leaves()
    late = GC("gc", at="update")
    choices: dict[str, Any] = {"linear.weight": None, "depthwise.weight": late}
    opt = optim.SGD(
        [
            {"params": [params["conv2d.weight"], params["conv1d.weight"]]},
            {"params": [params["linear.weight"]], "gc": None},
            {"params": [params["linear.bias"]]},
            {"params": [params["depthwise.weight"]], "gc": late},
            {"params": [params["gain"]], "gc": "gcc"},
        ],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        gc="gc",
    )
    assert [group["gc"] for group in opt.param_groups] == ["gc", None, "gc", late, "gcc"]
    train(opt, params, range(3))
    for name, p in same.items():
        gc = choices.get(name, "gc") if p.ndim >= 2 else None
        functional = gcfunc.sgd(0.1, 0.9, weight_decay=0.1, gc=gc)
        state = functional.init(p)
        new = p.detach()
        for seed in range(3):
            new, state = functional.step(new, random_like(same, seed)[name], state)
        assert difference([params[name]], [new]) <= EXACT, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_gc_changes_in_mid_training(compiled: bool) -> None:
    sizes = (4, 3)
    weight = torch.zeros(sizes, dtype=torch.float64, requires_grad=True)
    step = torch.arange(12.0, dtype=torch.float64).view(sizes).cos()
    # Decoupled, so that it matters where in the step.
    opt = optim.SGDW([("weight", weight)], lr=1.0, weight_decay=1.0, gc="gc", compile=compiled)
    for gc, at in (
        ("gc", "gradient"),
        (GC("gc", at="update"), "update"),
        (GC("gc"), "gradient"),
        (None, None),
        (GC({"weight": True}), "gradient"),
        (GC({"weight": False}), None),
        (GC({"weight": gcfunc.Units(dim=1)}), "columns"),
    ):
        opt.param_groups[0]["gc"] = gc
        weight.data = torch.ones(sizes).double().cumsum(1)
        weight.grad = step.clone()
        u = step + weight.detach()
        if at:
            taken = u if at == "update" else step
            u = u - taken.mean(0 if at == "columns" else 1, keepdim=True)
        want = weight.detach() - u
        opt.step()
        assert difference([weight], [want]) <= EXACT, gc


def test_gc_is_set_and_read_like_an_option() -> None:
    params = leaves()
    opt = optim.SGD(params.values(), lr=0.1, gc="gc")
    (group,) = opt.param_groups
    assert group["gc"] == "gc"
    group.update(gc="gcc")
    assert group["gc"] == "gcc"
    group["gc"] = None
    assert group["gc"] is None
    train(opt, params, range(2))
    same = leaves()
    train(torch.optim.SGD(same.values(), lr=0.1), same, range(2))
    assert difference([*params.values()], [*same.values()]) <= EXACT


def test_other_parameters_in_a_group() -> None:
    """Some trainers exchange the tensors of a group's list."""
    params = [torch.ones(4, 3).double(), torch.ones(4).double()]
    opt = optim.SGD([p.clone().requires_grad_() for p in params], lr=1.0, gc="gc")
    for group in (params, params[::-1]):
        own = [p.clone().requires_grad_() for p in group]
        opt.param_groups[0]["params"] = own
        for p in own:
            p.grad = torch.ones_like(p)
        opt.step()
        for p in own:
            assert torch.equal(p.detach(), torch.full_like(p, p.ndim - 1.0))


def test_two_models_of_the_same_names() -> None:
    results = []
    for names in (True, False):
        params, second = leaves(), leaves()
        both = {**params, **{f"2.{name}": p for name, p in second.items()}}
        given = [*params.items(), *second.items()] if names else both.values()
        results.append(train(optim.SGD(given, lr=0.1, momentum=0.9, gc="gc"), both, range(3)))
    assert difference(*map(values, results)) == 0


@pytest.mark.parametrize("gc", ["gc", "gcc", "linear"])
def test_one_optimizer_for_each_parameter_is_one_for_all(gc: str) -> None:
    """GC has nothing to take in a bias, or a rule in a weight: others hold what it takes."""
    results = []
    for choice in (gc, None):
        torch.manual_seed(0)
        together = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
        apart = copy.deepcopy(together)
        opt = optim.AdamW(together.parameters(), lr=0.1, gc=choice)
        own = [optim.AdamW([p], lr=0.1, gc=choice) for p in apart.parameters()]
        for _ in range(3):
            x = torch.randn(6, 3, 4, 4)
            for model, steps in ((together, [opt]), (apart, own)):
                model.zero_grad()
                model(x).square().mean().backward()
                for one in steps:
                    one.step()
        results.append([p.detach() for p in together.parameters()])
        assert difference(results[-1], [*apart.parameters()]) == 0
    assert difference(*results) > 1e-3


def test_weights_may_come_later() -> None:
    weight, bias = nn.Linear(3, 2).parameters()
    opt = optim.SGD([{"params": [bias]}], lr=1.0, gc="gc")
    opt.add_param_group({"params": [weight]})
    before = weight.detach().clone()
    weight.grad = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    opt.step()
    assert torch.equal(before - weight.detach(), torch.tensor([[-2.0, -1, 3], [-1, -1, 2]]))


def test_a_mask_of_the_whole_model_serves_its_parts() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    mask = gcfunc.select(model[:1]) | {"1.weight": False, "1.bias": False}
    named = [*model.named_parameters()]
    for own in (named[:2], named[2:]):
        optim.SGD(own, lr=0.1, gc=GC(mask))
