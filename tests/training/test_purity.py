"""A training step writes nothing, and torch.func goes through it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gcfunc
from tests.cases import largest_difference
from tests.models import ConvNet
from tests.training.cases import CASES, EXACT, built, images, named, storages


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_purity(accumulate: int, training: bool) -> None:
    model = ConvNet().double().train(training)
    model.head.requires_grad_(False)

    def loss_fn(out: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        own = (model.head.bias, model.norm.running_mean, model.conv.weight)
        return F.cross_entropy(out, y), (out, out[:1], y, own)

    opt = gcfunc.adamw(0.1, gc="gc")
    step = gcfunc.train_step(model, loss_fn, opt, has_aux=True, accumulate=accumulate, clip_norm=1)
    train, batch = step.init(), images(0)
    before = named(model)
    objects = [(t, t._version) for t in [*model.parameters(), *model.buffers()]]
    given = pytree.tree_leaves((train, batch))
    copies = [t.clone() for t in given]
    results = step(train, *batch)
    assert all(map(torch.equal, given, copies))
    assert largest_difference(named(model), before) == 0
    own = [*model.parameters(), *model.buffers()]
    assert all(t is o and t._version == v for t, (o, v) in zip(own, objects, strict=True))
    assert all(p.grad is None for p in model.parameters())
    sharing = storages(results)
    assert len({*sharing}) == len(sharing)
    assert not {*sharing} & {*storages((train, batch, own))}
    assert not {*storages(train)} & {*storages(own)}


def test_an_ensemble() -> None:
    """Members with buffers and learning rates of their own, under vmap."""
    case = CASES["cnn"]
    opt = gcfunc.adamw(0.01, gc="gc")
    models = [built(case, seed=s) for s in range(3)]
    steps = [gcfunc.train_step(m, case.loss_fn, opt, clip_norm=0.1, accumulate=2) for m in models]
    trains = []
    for i, step in enumerate(steps):
        train = step.init()
        state = gcfunc.update_hyperparams(train.state, lr=0.01 * (i + 1))
        trains.append(train._replace(state=state))
    stacked = pytree.tree_map(lambda *ts: torch.stack(ts), *trains)
    together = torch.func.vmap(steps[0], in_dims=(0, None, None))
    for t in range(2):
        stacked, losses = together(stacked, *images(t))
        results = [step(train, *images(t)) for step, train in zip(steps, trains, strict=True)]
        trains = [train for train, _ in results]
        torch.testing.assert_close(losses, torch.stack([loss for _, loss in results]))
    for i, train in enumerate(trains):
        member = pytree.tree_map(lambda t, i=i: t[i], stacked)
        assert largest_difference(member.params, train.params) < EXACT
        assert largest_difference(member.buffers, train.buffers) < EXACT


def test_the_gradient_of_training() -> None:
    """With respect to the learning rate, through two steps, against finite differences."""
    case = CASES["tied"]
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    step = gcfunc.train_step(built(case), case.loss_fn, opt, clip_norm=0.1, accumulate=2)

    def final_loss(lr: Tensor) -> Tensor:
        train = step.init()
        hyperparams = train.state.hyperparams | {"lr": lr}
        train = train._replace(state=train.state._replace(hyperparams=hyperparams))
        for _ in range(2):
            train, _ = step(train, *case.batch(0))
        return step(train, *case.batch(0))[1]

    lr = torch.tensor(0.1, dtype=torch.float64)
    forward = torch.func.grad(final_loss)(lr)
    finite = (final_loss(lr + 1e-5) - final_loss(lr - 1e-5)) / 2e-5
    assert abs(forward) > 1e-4
    torch.testing.assert_close(forward, finite, rtol=1e-6, atol=0.0)


def test_under_no_grad() -> None:
    case = CASES["cnn"]
    step = gcfunc.train_step(built(case), case.loss_fn, gcfunc.sgd(0.1))
    expected, _ = step(step.init(), *case.batch(0))
    with torch.no_grad():
        train, _ = step(step.init(), *case.batch(0))
    assert largest_difference(train.params, expected.params) == 0
