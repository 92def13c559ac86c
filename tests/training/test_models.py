"""What models bring along: dropout, buffers, frozen and unused parameters, ways to be called."""

import collections
import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gcfunc
from tests.cases import largest_difference
from tests.models import ConvNet
from tests.training.cases import (
    CASES,
    EXACT,
    STEPS,
    Loss,
    built,
    difference,
    images,
    named,
    ordinary,
)


def test_dropout_is_drawn_anew() -> None:
    model = ConvNet(dropout=0.5).double()
    step = gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1))
    train, batch = step.init(), images(0)
    torch.manual_seed(0)
    losses = [step(train, *batch)[1].item() for _ in range(3)]
    assert len({*losses}) == 3
    torch.manual_seed(0)
    assert [step(train, *batch)[1].item() for _ in range(3)] == losses
    model.eval()
    assert len({step(train, *batch)[1].item() for _ in range(3)}) == 1


def test_eval_mode_leaves_buffers_alone() -> None:
    model = built(CASES["cnn"]).eval()
    step = gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1))
    train = step.init()
    stepped, _ = step(train, *images(0))
    assert largest_difference(stepped.buffers, train.buffers) == 0
    model.train()
    stepped, _ = step(train, *images(0))
    assert stepped.buffers["norm.num_batches_tracked"] == 1
    assert largest_difference(stepped.buffers, train.buffers) > 0.01


def test_a_buffer_that_the_forward_replaces() -> None:
    class Counting(nn.Linear):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + x.detach().sum(0)
            return super().forward(x)

    model = Counting()
    seen = model.seen
    step = gcfunc.train_step(model, torch.mean, gcfunc.sgd(0.1), accumulate=2)
    train = step.init()
    for t in range(1, 3):
        train, _ = step(train, torch.ones(4, 3))
        assert train.buffers["seen"].tolist() == [4.0 * t] * 3
    assert model.seen is seen
    assert seen.tolist() == [0.0] * 3


def test_frozen_parameters_are_constants() -> None:
    model = built(CASES["cnn"])
    model.get_submodule("conv").requires_grad_(False)
    expected = copy.deepcopy(model)
    opt = gcfunc.adamw(0.1)
    step = gcfunc.train_step(model, F.cross_entropy, opt)
    train = step.init()
    assert [*train.params] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert "conv.weight" not in train.state.slots["exp_avg"]
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], 0.1)
    for t in range(STEPS):
        train, _ = step(train, *images(t))
        ordinary(expected, optimizer, F.cross_entropy, *images(t))
    trained = {name: t for name, t in named(expected).items() if "conv" not in name}
    assert largest_difference(train.params | train.buffers, trained) < EXACT


def test_what_is_trained_is_decided_once() -> None:
    """Freezing and thawing the skeleton afterwards changes nothing, and records no history."""
    model = built(CASES["cnn"])
    model.get_submodule("conv").requires_grad_(False)
    step = gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1))
    train = step.init()
    expected, _ = step(train, *images(0))
    for thawed in (True, False):
        model.requires_grad_(thawed)
        assert [*step.init().params] == [*train.params]
        stepped, loss = step(train, *images(0))
        assert largest_difference(stepped.params, expected.params) == 0
        assert not any(t.requires_grad for t in [loss, *pytree.tree_leaves(stepped)])


def test_an_unused_parameter_is_decayed_and_coasts() -> None:
    """Autograd gives it None, and torch.optim leaves it alone."""

    class Half(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1)
            self.unused = nn.Parameter(torch.ones(3))

    x, model = torch.ones(1, 2), Half()
    step = gcfunc.train_step(model, torch.sum, gcfunc.sgd(0.1, weight_decay=0.5))
    stepped, _ = step(step.init(), x)
    torch.testing.assert_close(stepped.params["unused"], torch.full((3,), 0.95))

    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5).step()
    assert model.unused.tolist() == [1.0] * 3


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, *, scale: Any = 1.0, labels: Tensor | None = None) -> Any:
        out = super().forward(x) * scale
        if labels is None:
            return out
        return {"loss": F.mse_loss(out, labels), "logits": out}


def test_ways_to_give_inputs() -> None:
    torch.manual_seed(0)
    model = TwoInputs(3, 2)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    given: list[tuple[Any, Loss, tuple[Tensor, ...]]] = [
        (x, F.mse_loss, (y,)),
        ((x,), F.mse_loss, (y,)),
        ({"x": x}, F.mse_loss, (y,)),
        ({"x": x, "labels": y}, lambda out: out["loss"], ()),
        (collections.UserDict({"x": x, "labels": y, "scale": 1.0}), lambda out: out["loss"], ()),
    ]
    for accumulate in (1, 2):
        steps = [
            gcfunc.train_step(model, loss_fn, gcfunc.sgd(0.1), accumulate=accumulate)
            for _, loss_fn, _ in given
        ]
        trains = [
            step(step.init(), inputs, *targets)[0]
            for step, (inputs, _, targets) in zip(steps, given, strict=True)
        ]
        for train in trains[1:]:
            assert largest_difference(train.params, trains[0].params) == 0
        assert largest_difference(trains[0].params, steps[0].init().params) > 1e-3


class Pair(NamedTuple):
    x: Tensor
    gate: Tensor


def test_a_named_tuple_is_one_input() -> None:
    class Gated(nn.Linear):
        def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
            return super().forward(pair.x) * pair.gate

    step = gcfunc.train_step(Gated(2, 4), torch.mean, gcfunc.sgd(0.1), accumulate=2)
    train = step.init()
    stepped, _ = step(train, Pair(torch.ones(4, 2), torch.ones(4, 1)))
    assert largest_difference(stepped.params, train.params) > 0


def test_a_hugging_face_model() -> None:
    from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).double().eval()
    expected = copy.deepcopy(model)
    ids = torch.randint(11, (4, 6))
    batch = BatchEncoding({"input_ids": ids, "labels": ids})
    step = gcfunc.train_step(
        model, lambda out: (out.loss, out.logits), gcfunc.sgd(0.1), has_aux=True, accumulate=2
    )
    train, loss, logits = step(step.init(), batch)
    assert logits.shape == (2, 2, 6, 11)
    output = expected(**batch)
    output.loss.backward()
    torch.optim.SGD(expected.parameters(), 0.1).step()
    assert difference(train, expected) < EXACT
    torch.testing.assert_close(loss, output.loss.detach())
