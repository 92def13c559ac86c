"""Without GC the drop-ins are torch's, whatever is done with an optimizer."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcfunc import GC, optim
from gcfunc._catalog import CATALOG
from gcfunc._tensors.versions import TORCH
from tests.cases import Params, random_like
from tests.optim.training import (
    EXACT,
    PLAIN,
    New,
    Options,
    difference,
    leaves,
    require_same_state,
    saved,
    set_grads,
    train,
)

Scenario = Callable[[New, Params], Optimizer]


def several_groups(new: New, params: Params) -> Optimizer:
    groups = [
        {"params": [params["conv2d.weight"], params["linear.bias"]], "lr": 0.2},
        {"params": [params["linear.weight"]], "weight_decay": 0.5, "maximize": True},
        {"params": [p for n, p in params.items() if n.startswith(("conv1d", "depth", "gain"))]},
    ]
    return train(new(groups), params, range(4))


def a_group_added(new: New, params: Params) -> Optimizer:
    first, *others = params.values()
    opt = train(new([first]), params, range(3))
    opt.add_param_group({"params": others, "lr": 0.3})
    return train(opt, params, range(3, 6))


def some_without_gradient(new: New, params: Params) -> Optimizer:
    return train(new(params.values()), params, range(4), only=["linear.weight", "linear.bias"])


def first_gradients_later(new: New, params: Params) -> Optimizer:
    """Each parameter has its own count of steps."""
    opt = new(params.values())
    train(opt, params, range(2), only=["linear.weight"])
    train(opt, params, range(2, 4), only=["linear.weight", "conv2d.weight", "gain"])
    return train(opt, params, range(4, 7))


def gradients_come_and_go(new: New, params: Params) -> Optimizer:
    opt, names = new(params.values()), [*params]
    for seed in range(6):
        train(opt, params, [seed], only=names[seed % 3 :: 2])
    return train(opt, params, range(6, 8))


def counters_reset(new: New, params: Params) -> Optimizer:
    """In place: of one parameter, then of all."""
    opt = train(new([{"params": [*params.values()]}]), params, range(3))
    first = next(iter(params.values()))
    for some in ([first], [*params.values()]):
        for p in some:
            for value in opt.state[p].values():
                if isinstance(value, Tensor):
                    value.zero_()
        train(opt, params, range(3, 6))
    return opt


def no_gradient_at_all(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2), only=[])
    return train(opt, params, range(2))


def frozen(new: New, params: Params) -> Optimizer:
    weight = params["linear.weight"]
    opt = new(params.values())
    for seed in range(4):
        weight.requires_grad_(seed >= 2)
        opt.zero_grad()
        grads = random_like(params, seed)
        torch.stack([(p * grads[n]).sum() for n, p in params.items()]).sum().backward()
        assert (weight.grad is None) == (seed < 2)
        opt.step()
    return opt


def zeros_for_gradients(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    opt.zero_grad(set_to_none=False)
    opt.step()
    opt.zero_grad()
    opt.step()
    return train(opt, params, range(2))


def closures(new: New, params: Params) -> Optimizer:
    opt: Any = new(params.values())
    calls: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = torch.stack([(p**2).sum() for p in params.values()]).sum()
        loss.backward()
        calls.append(loss)
        return loss

    for i in range(3):
        assert opt.step(closure) is calls[-1]
        assert len(calls) == i + 1
    return opt


def other_options(new: New, params: Params) -> Optimizer:
    """Each changed in the middle of training; a number, a tensor, the same number again."""
    opt = new(params.values())
    (group,) = opt.param_groups
    changes: Options = {"weight_decay": 0.3, "eps": 0.2, "betas": (0.3, 0.6), "lr_decay": 0.2}
    changes |= {"dampening": 0.0, "momentum": 0.5, "maximize": not group["maximize"]}
    changes["decoupled_weight_decay"] = not group.get("decoupled_weight_decay")
    train(opt, params, range(2))
    for option in changes.keys() & group.keys():
        if option != "momentum" or group["momentum"]:
            group[option] = changes[option]
    train(opt, params, range(2, 4))
    for lr in (0.2, torch.tensor(0.05, dtype=torch.float64), 0.2):
        group["lr"] = lr
        train(opt, params, range(4, 6))
    return opt


def a_tensor_lr(new: New, params: Params) -> Optimizer:
    opt = new(params.values(), lr=torch.tensor(0.2, dtype=torch.float64))
    train(opt, params, range(2))
    opt.param_groups[0]["lr"].fill_(0.05)
    return train(opt, params, range(2, 4))


def a_tensor_lr_of_one_element(new: New, params: Params) -> Optimizer:
    return train(new(params.values(), lr=torch.tensor([0.2]).double()), params, range(3))


def names(new: New, params: Params) -> Optimizer:
    return train(new(params.items()), params, range(3))


def clipped(new: New, params: Params) -> Optimizer:
    opt = new(params.values())
    for seed in range(3):
        set_grads(params, seed)
        nn.utils.clip_grad_norm_(params.values(), 0.5, foreach=True)
        opt.step()
    return opt


def strided(new: New, params: Params) -> Optimizer:
    filters, matrix = params["conv2d.weight"], params["linear.weight"]
    filters.data = filters.data.to(memory_format=torch.channels_last)
    matrix.data = matrix.data.t().contiguous().t()
    return train(new(params.values()), params, range(3))


def moved(new: New, params: Params) -> Optimizer:
    """``p.data = ...`` keeps the object."""
    opt = train(new(params.values()), params, range(2))
    for p in params.values():
        p.data = p.data.clone() * 0.5
    return train(opt, params, range(2, 4))


def state_replaced(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    for entry in opt.state.values():
        entry.update({slot: t * 0.5 for slot, t in entry.items() if slot != "step"})
    train(opt, params, range(2, 4))
    for entry in opt.state.values():
        if "step" in entry:
            entry["step"] = torch.tensor(7.0)
    return train(opt, params, range(4, 6))


def state_cleared(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    opt.state.clear()
    train(opt, params, range(2, 4))
    opt.state.pop(params["conv2d.weight"], None)
    return train(opt, params, range(4, 6))


def groups_replaced(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    (group,) = opt.param_groups
    opt.param_groups = [dict(group, params=[p]) for p in group["params"]][1:]
    train(opt, params, range(2, 4))
    opt.param_groups = [dict(group, lr=0.3) for group in opt.param_groups]
    train(opt, params, range(2, 4))
    opt.param_groups.clear()
    opt.add_param_group({"params": [*params.values()], "lr": 0.3})
    return train(opt, params, range(4, 6))


def without_momentum_for_a_while(new: New, params: Params) -> Optimizer:
    """Also in a group of its own, which torch asks nothing about Nesterov."""
    one, *others = params.values()
    opt = new([{"params": [one], "momentum": 0}, {"params": others}])
    if "nesterov" not in opt.defaults:  # torch's RMSprop makes no buffer later than in step 1
        return train(opt, params, range(2))
    train(opt, params, range(2))
    for momentum in (0, 0.9):
        for group in opt.param_groups:
            group["momentum"] = momentum
        train(opt, params, range(2, 4))
    return opt


def loaded_in_the_middle(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    earlier = saved(opt)
    train(opt, params, range(2, 5))
    opt.load_state_dict(earlier)
    return train(opt, params, range(2, 5))


SCENARIOS: list[Scenario] = [
    several_groups,
    a_group_added,
    some_without_gradient,
    first_gradients_later,
    gradients_come_and_go,
    counters_reset,
    no_gradient_at_all,
    frozen,
    zeros_for_gradients,
    closures,
    other_options,
    a_tensor_lr,
    a_tensor_lr_of_one_element,
    names,
    clipped,
    strided,
    moved,
    state_replaced,
    state_cleared,
    groups_replaced,
    without_momentum_for_a_while,
    loaded_in_the_middle,
]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_without_gc_it_is_torch(scenario: Scenario, kind: str) -> None:
    name, options = PLAIN[kind]
    params, same, start = leaves(), leaves(), leaves()
    ours = scenario(partial(getattr(optim, name), **options), params)
    if name == "Adagrad" and scenario in (a_group_added, state_cleared) and TORCH < (2, 12):
        with pytest.raises(KeyError, match="sum"):  # made by its constructor alone
            scenario(partial(getattr(torch.optim, name), **options), same)
        assert difference([*params.values()], [*start.values()]) > 1e-3
        return
    theirs = scenario(partial(getattr(torch.optim, name), **options), same)
    assert difference([*params.values()], [*same.values()]) <= EXACT
    require_same_state(ours.state_dict(), theirs.state_dict())
    assert difference([*params.values()], [*start.values()]) > 1e-3


OF_TORCH = [row.drop_in.__name__ for row in CATALOG.values() if row.twin]


@pytest.mark.parametrize("name", [*OF_TORCH, "AdamW_GC2"])
def test_signature_is_that_of_torch_and_two_arguments_more(name: str) -> None:
    ours = inspect.signature(getattr(optim, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name.partition("_")[0])).parameters
    assert {*ours} - {"gc", "compile", "kwargs"} <= {*theirs}
    assert [*ours][:3] == [*theirs][:3]
    assert ours["gc"].default == (GC("gc", at="update") if "_" in name else None)
    assert ours["compile"].default is None
