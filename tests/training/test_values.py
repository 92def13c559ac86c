"""``gcfunc.train_step``: what the ordinary loop computes, as one function."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import TrainState
from tests.cases import largest_difference
from tests.training.cases import (
    CASES,
    CENTRALIZED,
    EXACT,
    PLAIN,
    STEPS,
    ByHand,
    assert_equals_ordinary,
    built,
    difference,
)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: str, name: str) -> None:
    opt, torch_optim = PLAIN[name]
    assert_equals_ordinary(CASES[case], opt, lambda model: torch_optim(model.parameters()))


@pytest.mark.parametrize("name", CENTRALIZED)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_optimizer_on_the_gradients_of_autograd(case: str, name: str) -> None:
    opt = CENTRALIZED[name]("gc")
    assert_equals_ordinary(CASES[case], opt, lambda model: ByHand(model, opt))


@pytest.mark.parametrize("name", CENTRALIZED)
def test_gc_makes_a_difference(name: str) -> None:
    case, trains = CASES["cnn"], []
    for gc in ("gc", None):
        step = gcfunc.train_step(built(case), case.loss_fn, CENTRALIZED[name](gc))
        trains.append(step(step.init(), *case.batch(0))[0])
    assert largest_difference(trains[0].params, trains[1].params) > 1e-3


def test_sgd_with_gc_written_out() -> None:
    """Decay joins the gradient and is centralized with it; momentum comes after."""
    case, lr, momentum, decay = CASES["cnn"], 0.1, 0.9, 0.01
    model, expected = built(case), built(case)
    opt = gcfunc.sgd(lr, momentum, weight_decay=decay, gc="gc")
    step = gcfunc.train_step(model, case.loss_fn, opt)
    train = step.init()
    params = [*expected.parameters()]
    buffers: list[Tensor | None] = [None] * len(params)
    for t in range(STEPS):
        train, _ = step(train, *case.batch(t))
        x, y = case.batch(t)
        grads = torch.autograd.grad(case.loss_fn(expected(x), y), params)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                u = g + decay * p
                if u.ndim > 1:
                    u = u - u.mean(tuple(range(1, u.ndim)), keepdim=True)
                old = buffers[i]
                b = buffers[i] = u if old is None else momentum * old + u
                p.sub_(lr * b)
    assert difference(train, expected) < EXACT


def test_the_loss_sees_the_parameters_of_the_step() -> None:
    """A penalty that reads them from the model."""
    model = nn.Linear(3, 1)

    def loss_fn(out: Tensor) -> Tensor:
        return 0.5 * model.weight.square().sum() + 0.0 * out.sum()

    step = gcfunc.train_step(model, loss_fn, gcfunc.sgd(0.5))
    train = step.init()
    for t in range(1, 3):
        train, _ = step(train, torch.ones(2, 3))
        torch.testing.assert_close(train.params["weight"], 0.5**t * model.weight.detach())


def test_training_goes_on_from_a_checkpoint() -> None:
    case = CASES["cnn"]
    opt = gcfunc.adamw(0.01, gc="gc")
    step = gcfunc.train_step(built(case), case.loss_fn, opt)
    train, _ = step(step.init(), *case.batch(0))
    file = io.BytesIO()
    torch.save([train.params, train.buffers, gcfunc.state_dict(train.state)], file)
    file.seek(0)

    model = built(case, seed=1)
    elsewhere = gcfunc.train_step(model, case.loss_fn, opt)
    params, buffers, state = torch.load(file, weights_only=True)
    fresh = elsewhere.init().state
    resumed = TrainState(params, buffers, gcfunc.load_state_dict(fresh, state))
    train, _ = step(train, *case.batch(1))
    resumed, _ = elsewhere(resumed, *case.batch(1))
    assert all(map(torch.equal, pytree.tree_leaves(resumed), pytree.tree_leaves(train)))
    model.load_state_dict(train.params | train.buffers)
    assert difference(train, model) == 0
