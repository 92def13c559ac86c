"""Lookahead and its inner optimizer have one list of groups and one state."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from gcfunc import optim
from tests.cases import Params
from tests.optim.training import difference, leaves, saved, train, values

Made = tuple[optim.Lookahead, Params]
INNER: dict[str, Callable[..., Any]] = {
    "SGD": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, gc="gc"),
    "AdamW": lambda params: optim.AdamW(params, lr=0.1, weight_decay=0.1, gc="gc"),
    "RMSprop": lambda params: optim.RMSprop(params, lr=0.1, momentum=0.5, gc="gc"),
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.1, lr_decay=0.1, gc="gc"),
    "Lion": lambda params: optim.Lion(params, lr=0.1, gc="gc"),
}
inner_classes = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def make(inner: Callable[..., Any]) -> Made:
    params = leaves()
    return optim.Lookahead(inner(params.values()), k=2, alpha=0.25), params


def require_one(opt: optim.Lookahead) -> None:
    assert opt.param_groups is opt._inner.param_groups
    assert opt.state is opt._inner.state
    assert all({"k", "gc"} <= group.keys() for group in opt.param_groups)


def ask_outer(opt: optim.Lookahead) -> Optimizer:
    return opt


def ask_inner(opt: optim.Lookahead) -> Optimizer:
    return opt._inner


asked = pytest.mark.parametrize("ask", [ask_outer, ask_inner])


@asked
@inner_classes
def test_what_either_loads_the_other_has(
    inner: Callable[..., Any], ask: Callable[[optim.Lookahead], Optimizer]
) -> None:
    opt, params = make(inner)
    train(opt, params, range(3))
    state, start = saved(opt), {n: p.detach().clone() for n, p in params.items()}
    want = values(train(opt, params, range(3, 6)))
    other, own = make(inner)
    train(other, own, range(10, 11))
    ask(other).load_state_dict(state)
    require_one(other)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(start[name])
    assert difference(values(train(other, own, range(3, 6))), want) == 0
    assert other.param_groups[0]["k"] == 2


def test_an_inner_optimizer_of_before_is_loaded_with_the_present_k() -> None:
    """Of what was saved without a lookahead around it, ``k`` and ``alpha`` are this one's."""
    params = leaves()
    plain = train(INNER["AdamW"](params.values()), params, range(3))
    opt, own = make(INNER["AdamW"])
    opt._inner.load_state_dict(saved(plain))
    require_one(opt)
    assert (opt.param_groups[0]["k"], opt.param_groups[0]["alpha"]) == (2, 0.25)
    train(opt, own, range(3, 6))


@asked
@inner_classes
def test_what_either_adds_both_step_and_zero(
    inner: Callable[..., Any], ask: Callable[[optim.Lookahead], Optimizer]
) -> None:
    opt, params = make(inner)
    train(opt, params, range(1))
    new = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    ask(opt).add_param_group({"params": [new], "lr": 0.5, "weight_decay": 0.0})
    require_one(opt)
    new.grad = torch.tensor([[1.0, 2.0], [3.0, 5.0], [1.0, 0.0]], dtype=torch.float64)
    before = new.detach().clone()
    train(opt, params, range(1, 2))
    moved = new.detach() - before
    # Each row moves by as much up as down: it is centralized, too.
    assert float(moved.abs().min()) > 0
    assert float(moved.sum(1).abs().max()) < 1e-6
    ask(opt).zero_grad()
    assert all(p.grad is None for p in (*params.values(), new))


def test_a_group_added_through_either_steps_alike() -> None:
    results = []
    for ask in (ask_outer, ask_inner):
        opt, params = make(INNER["AdamW"])
        names = [*params]
        first, second = names[:3], names[3:]
        opt = optim.Lookahead(INNER["AdamW"]([params[n] for n in first]), k=2)
        train(opt, params, range(3))
        ask(opt).add_param_group({"params": [params[n] for n in second]})
        results.append(values(train(opt, params, range(3, 8))))
    assert difference(*results) == 0


def by_deepcopy(made: Made) -> Made:
    return copy.deepcopy(made)


def by_pickle(made: Made) -> Made:
    again: Made = pickle.loads(pickle.dumps(made))
    return again


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle])
@inner_classes
def test_a_copy_has_one_list_of_groups_and_one_state(
    inner: Callable[..., Any], copied: Callable[[Made], Made]
) -> None:
    opt, params = make(inner)
    train(opt, params, range(3))
    other, own = copied((opt, params))
    require_one(other)
    assert other.param_groups is not opt.param_groups
    assert [p is q for p, q in zip(other.param_groups[0]["params"], own.values(), strict=True)]
    want = values(train(opt, params, range(3, 6)))
    assert difference(values(train(other, own, range(3, 6))), want) == 0


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")  # the outer one steps
@asked
def test_schedulers_take_either(ask: Callable[[optim.Lookahead], Optimizer]) -> None:
    opt, params = make(INNER["SGD"])
    schedule = ExponentialLR(ask(opt), 0.5)
    train(opt, params, range(1))
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.05


def test_a_refused_lookahead_leaves_its_inner_optimizer() -> None:
    inner = INNER["SGD"]([nn.Parameter(torch.ones(2, 3))])
    groups, state = inner.param_groups, inner.state
    with pytest.raises(ValueError, match="k must be"):
        optim.Lookahead(inner, k=0)
    assert (inner.param_groups, inner.state) == (groups, state)
    assert "k" not in inner.param_groups[0]


def test_wrapping_changes_neither_groups_nor_state() -> None:
    params = leaves()
    inner = INNER["AdamW"](params.values())
    train(inner, params, range(2))
    groups, state = inner.param_groups, inner.state
    moment: Tensor = next(iter(state.values()))["exp_avg"]
    opt = optim.Lookahead(inner)
    assert opt.param_groups is groups
    assert opt.state is state
    assert next(iter(opt.state.values()))["exp_avg"] is moment
