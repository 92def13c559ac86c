"""Clipping, accumulation, autocast and aux, as the ordinary loop has them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gcfunc
from tests.cases import largest_difference
from tests.training.cases import CASES, LINEAR, PLAIN, ByHand, assert_equals_ordinary, built, images

OPTIONS: dict[str, dict[str, Any]] = {
    "clip_norm": {"clip_norm": 0.05},
    "accumulate": {"accumulate": 4},
    "both": {"clip_norm": 0.05, "accumulate": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_clipping_and_accumulation(case: str, options: str) -> None:
    """BatchNorm's statistics, which follow every micro-batch, included."""
    opt = gcfunc.sgd(0.5, 0.9, weight_decay=0.01, gc="gc")
    assert_equals_ordinary(CASES[case], opt, lambda model: ByHand(model, opt), **OPTIONS[options])


def test_a_small_gradient_is_not_clipped() -> None:
    case, opt = CASES["tied"], gcfunc.sgd(0.1)
    train, _ = gcfunc.train_step(built(case), case.loss_fn, opt, clip_norm=1e6)(
        (step := gcfunc.train_step(built(case), case.loss_fn, opt)).init(), *case.batch(0)
    )
    assert largest_difference(train.params, step(step.init(), *case.batch(0))[0].params) == 0


def test_clipping_comes_before_centralization() -> None:
    """A gradient that is all mean has a norm to clip, and nothing is left of it afterwards."""
    model = nn.Linear(3, 1)
    opt = gcfunc.sgd(1.0, gc="gc")
    step = gcfunc.train_step(model, lambda out: out.sum(), opt, clip_norm=1.0)
    train = step.init()
    stepped, _ = step(train, torch.full((1, 3), 100.0))
    torch.testing.assert_close(stepped.params["weight"], train.params["weight"])
    moved = train.params["bias"] - stepped.params["bias"]
    torch.testing.assert_close(moved, torch.tensor([1 / 30001**0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str, dtype: torch.dtype) -> None:
    """The same kernels in the same precision; a tied weight's two gradients are added wider."""
    opt, torch_optim = PLAIN["sgd"]
    assert_equals_ordinary(
        CASES[case],
        opt,
        lambda model: torch_optim(model.parameters()),
        dtype=torch.float32,
        tolerance=1e-6 if case == "cnn" else 5e-3,
        steps=3,
        autocast=dtype,
    )


def test_autocast_computes_in_16_bits() -> None:
    dtypes = []

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        dtypes.append(out.dtype)
        return F.cross_entropy(out, y)

    for autocast in (None, torch.bfloat16):
        model = built(CASES["cnn"], torch.float32)
        step = gcfunc.train_step(model, loss_fn, gcfunc.sgd(0.1), autocast=autocast)
        train, loss = step(step.init(), *images(0, torch.float32))
        assert loss.dtype is train.params["head.weight"].dtype is torch.float32
    assert dtypes == [torch.float32, torch.bfloat16]


def test_16_bit_gradients_are_summed_wide() -> None:
    """256 + 1 + 1 + ... in bfloat16 stays 256."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    opt = gcfunc.sgd(1.0)
    step = gcfunc.train_step(model, lambda out: out.sum(), opt, accumulate=8)
    train = step.init()
    train.params["weight"].zero_()
    x = torch.tensor([[2048.0], *[[8.0]] * 7], dtype=torch.bfloat16)
    stepped, _ = step(train, x)
    assert stepped.params["weight"].item() == -264
    assert stepped.params["weight"].dtype is torch.bfloat16


def logits_and_accuracy(out: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
    accuracy = (out.argmax(1) == y).double().mean()
    return F.cross_entropy(out, y), {"logits": out, "metrics": (accuracy,)}


def test_aux() -> None:
    model = built(CASES["cnn"]).eval()
    x, y = images(0)
    expected = model(x).detach()
    accuracy = (expected.argmax(1) == y).double().mean()
    step = gcfunc.train_step(model, logits_and_accuracy, gcfunc.sgd(0.1), has_aux=True)
    _, loss, aux = step(step.init(), x, y)
    torch.testing.assert_close(aux, {"logits": expected, "metrics": (accuracy,)})
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))
    assert not any(t.requires_grad for t in [loss, *pytree.tree_leaves(aux)])


def test_aux_of_micro_batches_is_stacked() -> None:
    model = built(CASES["cnn"]).eval()
    x, y = images(0)
    step = gcfunc.train_step(
        model, logits_and_accuracy, gcfunc.sgd(0.1), has_aux=True, accumulate=4
    )
    _, loss, aux = step(step.init(), x, y)
    expected = model(x).detach()
    torch.testing.assert_close(aux["logits"], expected.view(4, 2, 3))
    accuracies = (expected.argmax(1) == y).double().view(4, 2).mean(1)
    torch.testing.assert_close(aux["metrics"], (accuracies,))
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))


def test_repr() -> None:
    step = gcfunc.train_step(LINEAR, F.mse_loss, gcfunc.sgd(0.1), has_aux=True, clip_norm=1.0)
    assert repr(step) == (
        "train_step(Linear, sgd(lr=0.1, weight_decay=0.0), has_aux=True, clip_norm=1.0)"
    )
    assert repr(gcfunc.compile(step)) == f"compile({step!r})"
