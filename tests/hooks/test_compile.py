"""Hooks and torch.compile: the same graphs as without hooks, and the same gradients as eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gcfunc
from gcfunc.hooks import centralize_backward
from tests.cases import largest_difference
from tests.distributed import gradients, require_same

pytestmark = pytest.mark.usefixtures("fresh_compiler")

X = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a linear layer, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.fc = nn.Linear(27, 3)
        self.fc2 = nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc(torch.tanh(self.conv(x)).flatten(1)))
        return self.fc2(torch.tanh(self.fc2(x)))


def backward(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    F.cross_entropy(model(x), torch.arange(6) % 3).backward()


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def plain(model: Net) -> dict[str, Tensor]:
    """The gradients without hooks."""
    backward(model, X)
    grads = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    assert largest_difference(grads, gcfunc.centralize(grads)) > 1e-3
    return grads


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("first", ["hooks", "compile"])
def test_one_graph_with_and_without_hooks(
    model: Net, plain: dict[str, Tensor], backend: str, first: str
) -> None:
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    if first == "compile":
        backward(compiled, X)
        require_same(gradients(model), plain)
    handle = centralize_backward(model)
    for compiles in (first == "hooks", False):
        model.zero_grad()
        with torch.compiler.set_stance("default" if compiles else "fail_on_recompile"):
            backward(compiled, X)
        require_same(gradients(model), gcfunc.centralize(plain))
    handle.check(model)
    handle.remove()
    model.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        backward(compiled, X)
    require_same(gradients(model), plain)
    assert graphs() == 1
    assert not counters["graph_break"]


def test_registered_with_the_compiled_module(model: Net, plain: dict[str, Tensor]) -> None:
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    handle = centralize_backward(compiled)
    assert handle.names == ("_orig_mod.conv.weight", "_orig_mod.fc.weight", "_orig_mod.fc2.weight")
    backward(compiled, X)
    require_same(gradients(model), gcfunc.centralize(plain))


def test_compiled_in_place(model: Net, plain: dict[str, Tensor]) -> None:
    model.compile(backend="aot_eager", fullgraph=True)
    centralize_backward(model)
    backward(model, X)
    require_same(gradients(model), gcfunc.centralize(plain))
    assert graphs() == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of Dynamo's, at the break
def test_graph_breaks_are_those_of_the_model(model: Net, plain: dict[str, Tensor]) -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x

    broken = Broken()
    broken.load_state_dict(model.state_dict())
    counts = []
    for register in (False, True):
        torch.compiler.reset()
        counters.clear()
        if register:
            centralize_backward(broken)
        broken.zero_grad()
        backward(torch.compile(broken, backend="aot_eager"), X)
        counts.append((graphs(), sum(counters["graph_break"].values())))
    require_same(gradients(broken), gcfunc.centralize(plain))
    assert counts[0] == counts[1]
    assert counts[0][1] == 1


# Of Dynamo's, for code of Python 3.12.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.:UserWarning")
@pytest.mark.parametrize("order", ["hooks", "compile"])
def test_compiled_autograd(model: Net, plain: dict[str, Tensor], order: str) -> None:
    with torch._dynamo.config.patch(compiled_autograd=True):
        step = torch.compile(lambda: backward(model, X), backend="aot_eager")
        if order == "compile":
            step()
            require_same(gradients(model), plain)
        handle = centralize_backward(model)
        for _ in range(2):
            model.zero_grad()
            step()
            require_same(gradients(model), gcfunc.centralize(plain))
        assert counters["compiled_autograd"]["captures"] >= 1
        handle.remove()
        model.zero_grad()
        step()
        require_same(gradients(model), plain)
