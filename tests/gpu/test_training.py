"""Whole training steps on a device, against the same in float64 on the CPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gcfunc
from tests.cases import ALGORITHMS, Params
from tests.gpu.cases import each, require, wide
from tests.models import ConvNet

# Inductor's advice, of which the tests' own settings would make an error.
pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")

STEPS = 5
KINDS: dict[str, Callable[[Any], gcfunc.Optimizer]] = {
    "sgd-momentum": ALGORITHMS["sgd-momentum"],
    # A bias before a BatchNorm has a gradient of rounding errors, which a small eps makes large.
    "adamw": lambda gc: gcfunc.adamw(1e-2, eps=1e-3, gc=gc),
}
HOW: dict[str, dict[str, Any] | None] = {
    "donated": {"donate": True},
    "CUDA graphs": {"donate": True, "mode": "reduce-overhead"},
    "pure": {"donate": False},
    "pure, CUDA graphs": {"donate": False, "mode": "reduce-overhead"},
    "not compiled": None,
}


def data() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 2, 8, 8, generator=random), torch.randint(3, (4,), generator=random))
        for _ in range(STEPS)
    ]


def trained(
    model: torch.nn.Module, name: str, gc: str | None, how: dict[str, Any] | None
) -> tuple[Params, list[float]]:
    """Params and buffers, and the losses, after steps on the device and in the dtype it has."""
    weight = next(model.parameters())
    step: Any = gcfunc.train_step(model, F.cross_entropy, KINDS[name](gc))
    step = step if how is None else gcfunc.compile(step, **how)
    train, losses = step.init(), []
    for images, labels in data():
        # What CUDA graphs give is overwritten by the next step.
        torch.compiler.cudagraph_mark_step_begin()
        train, loss = step(train, images.to(weight), labels.to(weight.device))
        losses.append(float(loss))
        if how and "mode" in how and not how["donate"]:
            train = torch.utils._pytree.tree_map(Tensor.clone, train)
    return each(wide, train.params | train.buffers), losses


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", KINDS)
def test_a_training_step(name: str, how: str, device: str) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    want, losses = trained(copy.deepcopy(model).double(), name, "gc", None)
    without, _ = trained(copy.deepcopy(model).double(), name, None, None)
    have, own_losses = trained(model.to(device), name, "gc", HOW[how])
    require(have, want, without)
    assert own_losses == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_with_autocast(autocast: torch.dtype, device: str) -> None:
    """It goes the same way, to the few digits of 16 bits."""
    torch.manual_seed(0)
    model = ConvNet().to(device)
    ends = []
    for dtype in (autocast, None):
        step = gcfunc.compile(
            gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1, gc="gc"), autocast=dtype)
        )
        train = step.init()
        for images, labels in data():
            train, _ = step(train, images.to(device), labels.to(device))
        ends.append(each(wide, train.params))
    for key, t in ends[1].items():
        assert float((ends[0][key] - t).abs().max()) <= 0.02, key
    assert any(not torch.equal(ends[0][key], t) for key, t in ends[1].items())
