"""``torch.compile(opt.step, fullgraph=True)``: one graph, the same numbers, no recompiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import Optimizer, State
from tests.cases import ALGORITHMS, GCS, Params

STEPS = 20
Step = Callable[[Params, Params, State], tuple[Params, State]]

# Each dtype is arithmetic of its own, so both are in one tree; a step compiles for each once.
SHAPES = {
    "conv.weight": ((3, 2, 2, 2), torch.float64),
    "conv.bias": ((3,), torch.float64),
    "linear.weight": ((2, 5), torch.float32),
    "linear.bias": ((2,), torch.float32),
}
TOLERANCES = {torch.int64: 0.0, torch.float64: 1e-12, torch.float32: 2e-6}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def draw(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.5 + torch.randn(shape, generator=generator, dtype=dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def schedule(state: State, t: int) -> State:
    """Every hyperparameter of the state at another value."""
    new = {
        name: 2 + t % 3 if value.dtype is torch.int64 else 0.97 * float(value) + 7e-4 * (1 + t % 3)
        for name, value in state.hyperparams.items()
    }
    changed = gcfunc.update_hyperparams(state, **new)
    assert all(changed.hyperparams[name] != value for name, value in state.hyperparams.items())
    return changed


def assert_close(a: Any, b: Any) -> None:
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert x.stride() == y.stride()
        torch.testing.assert_close(x, y, rtol=TOLERANCES[y.dtype], atol=TOLERANCES[y.dtype])


def assert_one_graph_for_every_step(opt: Optimizer, step: Step) -> None:
    """Compiled once, then a schedule on every hyperparameter, each step compared with eager."""
    params = draw(0)
    state = schedule(opt.init(params), 0)
    eager = params, state
    for t in range(1 + STEPS):
        with torch.compiler.set_stance("fail_on_recompile" if t else "default"):
            params, state = step(params, draw(1 + t), state)
        eager = opt.step(eager[0], draw(1 + t), eager[1])
        assert_close((params, state), eager)
        assert graphs() == 1
        state, eager = schedule(state, t + 1), (eager[0], schedule(eager[1], t + 1))


@pytest.mark.parametrize("gc", ["plain", "gc", "gcc2"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_aot_eager(name: str, gc: str) -> None:
    opt = ALGORITHMS[name](GCS[gc])
    assert_one_graph_for_every_step(
        opt, torch.compile(opt.step, fullgraph=True, backend="aot_eager")
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_inductor(name: str) -> None:
    opt = ALGORITHMS[name](GCS["gc"])
    assert_one_graph_for_every_step(
        opt, torch.compile(opt.step, fullgraph=True, backend="inductor")
    )


def test_another_shape_recompiles() -> None:
    """Without this the tests above would pass under a stance that catches nothing."""
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    step = torch.compile(opt.step, fullgraph=True, backend="aot_eager")
    small, large = torch.ones(2, 3), torch.ones(2, 4)
    step(small, small, opt.init(small))
    with torch.compiler.set_stance("fail_on_recompile"):
        step(small, small, opt.init(small))
        with pytest.raises(RuntimeError, match="recompile"):
            step(large, large, opt.init(large))
    assert graphs() == 1
    step(large, large, opt.init(large))
    assert graphs() == 2


def test_a_number_for_lr_would_recompile() -> None:
    """Why hyperparameters are tensors of the state."""

    def step(p: Tensor, g: Tensor, lr: float) -> Tensor:
        return p - lr * g

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    p = torch.ones(2)
    compiled(p, p, 0.1)
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        compiled(p, p, 0.2)


def test_missing_gradients() -> None:
    opt = gcfunc.adamw(gc="gc")
    step = torch.compile(opt.step, fullgraph=True, backend="aot_eager")
    params, grads = draw(0), {**draw(1), "conv.weight": None, "linear.bias": None}
    state = opt.init(params)
    inputs = params, grads, state
    assert_close(step(*inputs), opt.step(*inputs))
    assert graphs() == 1


def test_the_whole_training_step() -> None:
    """Forward, backward and step in one graph."""
    model = torch.nn.Linear(4, 3, dtype=torch.float64)
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(params: Params, x: Tensor) -> Tensor:
        return (torch.func.functional_call(model, params, (x,)) - 1).square().mean()

    def train(params: Params, state: State, x: Tensor) -> tuple[Params, State]:
        return opt.step(params, torch.func.grad(loss)(params, x), state)

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    params = {name: p.detach() for name, p in model.named_parameters()}
    state = opt.init(params)
    assert_close(compiled(params, state, x), train(params, state, x))
    assert graphs() == 1
