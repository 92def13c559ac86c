"""Hyperparameters of the state: what they are made of, and how they change."""

from typing import Any

import numpy as np
import pytest
import torch

import gcfunc
from gcfunc import Optimizer, State
from tests.cases import Params, make_params, random_like


def step(opt: Optimizer, state: State) -> Params:
    params = make_params()
    new: Params = opt.step(params, random_like(params, 0), state)[0]
    return new


def test_numbers_keep_their_precision() -> None:
    state = gcfunc.adam(lr=0.1, betas=(0.9, 0.999)).init({"w": torch.ones(2)})
    assert {s.dtype for s in state.hyperparams.values()} == {torch.float64}
    assert state.hyperparams["lr"].item() == 0.1
    assert state.hyperparams["beta2"].item() == 0.999


@pytest.mark.parametrize(
    "lr",
    [torch.tensor(0.5), torch.tensor(0.5).double(), np.float32(0.5), np.array(0.5), np.array(1), 1],
)
def test_numbers_of_every_kind(lr: Any) -> None:
    opt = gcfunc.sgd(lr, gc="gc")
    state = opt.init(make_params())
    assert state.hyperparams["lr"] == float(lr)
    other = gcfunc.update_hyperparams(gcfunc.sgd(0.1, gc="gc").init(make_params()), lr=lr)
    assert other.hyperparams["lr"] == float(lr)
    assert torch.equal(step(opt, state)["linear.weight"], step(opt, other)["linear.weight"])


def test_a_tensor_is_copied() -> None:
    lr = torch.tensor(0.5)
    opt = gcfunc.sgd(lr)
    state = opt.init(make_params())
    lr.fill_(9.0)
    assert state.hyperparams["lr"] == 0.5


def test_betas_by_the_name_constructors_have_for_them() -> None:
    opt = gcfunc.adam(betas=(0.8, 0.9))
    state = gcfunc.update_hyperparams(gcfunc.adam().init(make_params()), betas=(0.8, 0.9))
    assert state.hyperparams == opt.init(make_params()).hyperparams
    with pytest.raises(ValueError, match=r"beta2 must be in \[0, 1\), got 1"):
        gcfunc.update_hyperparams(state, betas=(0.9, 1.0))


def test_groups_together_and_alone() -> None:
    opt = gcfunc.partition(
        {"body": gcfunc.adam(0.1), "head": gcfunc.sgd(0.2, 0.9)},
        lambda name, tensor: "head" if name.startswith("linear") else "body",
    )
    state = opt.init(make_params())
    together = gcfunc.update_hyperparams(state, lr=0.5)
    assert together.hyperparams["body.lr"] == together.hyperparams["head.lr"] == 0.5
    alone = gcfunc.update_hyperparams(state, **{"head.lr": 0.5, "body.betas": (0.5, 0.6)})
    assert alone.hyperparams["body.lr"] == 0.1
    assert alone.hyperparams["head.lr"] == 0.5
    assert alone.hyperparams["body.beta1"] == 0.5
    assert not torch.equal(step(opt, alone)["linear.bias"], step(opt, state)["linear.bias"])
    assert torch.equal(step(opt, together)["linear.bias"], step(opt, alone)["linear.bias"])


def test_momentum_as_a_tensor_can_be_raised_from_zero() -> None:
    params = make_params()
    opt = gcfunc.sgd(0.1, torch.tensor(0.0))
    state = gcfunc.update_hyperparams(opt.init(params), momentum=0.9)
    expected = gcfunc.sgd(0.1, 0.9)
    other = expected.init(params)
    for t in range(3):
        own, state = opt.step(params, random_like(params, t), state)
        want, other = expected.step(params, random_like(params, t), other)
    assert torch.equal(own["gain"], want["gain"])
    with pytest.raises(ValueError, match="momentum needs a buffer"):
        gcfunc.update_hyperparams(gcfunc.sgd(0.1).init(params), momentum=0.9)


def test_a_full_name_is_one_group_even_where_another_ends_like_it() -> None:
    inner = gcfunc.partition({"head": gcfunc.sgd(0.1)}, lambda name, tensor: "head")
    opt = gcfunc.partition(
        {"body": inner, "head": gcfunc.sgd(0.2)},
        lambda name, tensor: "head" if name.startswith("linear") else "body",
    )
    state = gcfunc.update_hyperparams(opt.init(make_params()), **{"head.lr": 0.5})
    assert state.hyperparams["head.lr"] == 0.5
    assert state.hyperparams["body.head.lr"] == 0.1


@pytest.mark.parametrize("lr", [10**400, -(10**400)])
def test_a_number_too_large_for_a_float(lr: int) -> None:
    with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
        gcfunc.sgd(lr)
