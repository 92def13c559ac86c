"""Training steps compiled: one graph, the same numbers, in place or not."""

import copy
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import Optimizer, TrainState
from tests.cases import largest_difference
from tests.models import ConvNet
from tests.training.cases import (
    CASES,
    CENTRALIZED,
    EXACT,
    LINEAR,
    Case,
    Loss,
    X,
    Y,
    built,
    images,
    storages,
)

COMPILED: dict[str, tuple[Case, Callable[[Any], Optimizer], dict[str, Any]]] = {
    "cnn": (CASES["cnn"], CENTRALIZED["sgd"], {"clip_norm": 0.1, "accumulate": 2}),
    "tied": (CASES["tied"], CENTRALIZED["ranger"], {"autocast": torch.bfloat16}),
    "transformer": (CASES["transformer"], CENTRALIZED["adamw"], {}),
}


def addresses(train: TrainState) -> list[int]:
    return [t.data_ptr() for t in pytree.tree_leaves(train)]


def assert_one_graph(
    case: Case, step: Any, compiled: Any, dtype: torch.dtype, donated: bool = False
) -> None:
    """Compiled once; then other batches and learning rates, each step compared with eager."""
    tolerance = EXACT if dtype is torch.float64 else 1e-3
    train, other = step.init(), step.init()
    for t in range(4):
        given, before = train, addresses(train)
        with torch.compiler.set_stance("fail_on_recompile" if t else "default"):
            train, *results = compiled(train, *case.batch(t, dtype))
        assert (train is given) is donated
        assert (addresses(train) == before) is donated
        other, *expected = step(other, *case.batch(t, dtype))
        torch.testing.assert_close(
            (train, results), (other, expected), rtol=tolerance, atol=tolerance
        )
        state = gcfunc.update_hyperparams(train.state, lr=0.1 / (t + 2))
        train, other = train._replace(state=state), other._replace(state=state)
        other = pytree.tree_map(torch.clone, other)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["torch.compile", "donated"])
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph(name: str, how: str) -> None:
    case, opt, options = COMPILED[name]
    dtype = torch.float32 if "autocast" in options else torch.float64
    step = gcfunc.train_step(built(case, dtype), case.loss_fn, opt("gc"), **options)
    if how == "donated":
        assert_one_graph(case, step, gcfunc.compile(step, backend="aot_eager"), dtype, donated=True)
    else:
        compiled = torch.compile(step.step, fullgraph=True, backend="aot_eager")
        assert_one_graph(case, step, compiled, dtype)


def bystanders(model: nn.Module) -> Loss:
    """A loss whose aux holds the very tensors that the step is about to write."""

    def loss_fn(out: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        return F.cross_entropy(out, y), {"own": own, "out": out, "head": out[:2], "y": y}

    return loss_fn


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("donate", [True, False])
def test_one_graph_on_inductor(donate: bool) -> None:
    """In place too, where Inductor crashes on some forms and loses the writes of others."""
    case, model = CASES["cnn"], built(CASES["cnn"])
    opt = gcfunc.sgd(0.1, 0.9, weight_decay=0.01, gc="gc")
    step = gcfunc.train_step(model, bystanders(model), opt, has_aux=True, clip_norm=0.1)
    compiled = gcfunc.compile(step, donate=donate)
    assert_one_graph(case, step, compiled, torch.float64, donated=donate)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_dropout_is_drawn_anew(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5))
    step = gcfunc.train_step(model, torch.mean, gcfunc.sgd(0.0))
    compiled = gcfunc.compile(step, backend=backend)
    train, x = compiled.init(), torch.ones(2, 3)
    losses = [compiled(train, x)[1].item() for _ in range(3)]
    assert len({*losses}) == 3
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("donate", [True, False])
def test_what_a_compiled_step_leaves_alone(donate: bool) -> None:
    """The module and its objects, the batch, and the train state unless donated."""
    model = ConvNet().double()
    model.conv.requires_grad_(False)
    step = gcfunc.train_step(model, bystanders(model), gcfunc.adamw(0.1, gc="gc"), has_aux=True)
    compiled = gcfunc.compile(step, donate=donate, backend="aot_eager")
    train = compiled.init()
    own = [*model.parameters(), *model.buffers()]
    given = [*own, *images(0), *([] if donate else pytree.tree_leaves(train))]
    copies = [t.detach().clone() for t in given]
    x, y = given[len(own) : len(own) + 2]
    new, loss, aux = compiled(train, x, y)
    assert all(map(torch.equal, given, copies))
    assert all(map(operator.is_, own, [*model.parameters(), *model.buffers()]))
    results = storages((new, loss, aux))
    assert len({*results}) == len(results)
    assert not {*results} & {*storages(given)}

    model.conv.weight.data.zero_()  # constants are read anew
    _, expected, _ = step(train, x, y)
    torch.testing.assert_close(compiled(train, x, y)[1], expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_train_states_take_turns() -> None:
    case = CASES["cnn"]
    step = gcfunc.train_step(built(case), case.loss_fn, gcfunc.sgd(0.1, 0.9, gc="gc"))
    compiled = gcfunc.compile(step, backend="aot_eager")
    own, pure = [step.init(), step.init()], [step.init(), step.init()]
    for t in range(4):
        compiled(own[t % 2], *case.batch(t))
        pure[t % 2], _ = step(pure[t % 2], *case.batch(t))
    torch.testing.assert_close(own, pure)
    assert largest_difference(own[0].params, own[1].params) > 1e-3
    assert counters["stats"]["unique_graphs"] == 1
    # A state in which only the buffers are others.
    buffers = {name: b.clone() for name, b in own[0].buffers.items()}
    before = copy.deepcopy(own[0].buffers)
    compiled(own[0]._replace(buffers=buffers), *case.batch(0))
    assert largest_difference(own[0].buffers, before) == 0
    assert largest_difference(buffers, before) > 1e-3


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_follows_the_mode_of_the_model() -> None:
    model = ConvNet(dropout=0.5).double()
    compiled = gcfunc.compile(
        gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.0)), backend="aot_eager"
    )
    train = compiled.init()
    compiled(train, *images(0))
    assert train.buffers["norm.num_batches_tracked"] == 1
    model.eval()
    losses = {compiled(train, *images(0))[1].item() for _ in range(2)}
    assert len(losses) == 1
    assert train.buffers["norm.num_batches_tracked"] == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_memory_that_is_shared_is_refused() -> None:
    model = ConvNet()
    compiled = gcfunc.compile(
        gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1)), backend="aot_eager"
    )
    train = compiled.init()
    train.buffers["norm.running_mean"] = train.params["norm.bias"]
    with pytest.raises(ValueError, match="may share memory"):
        compiled(train, *images(0, torch.float32))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("steps", [0, 1])
def test_bad_calls_of_a_donated_step(steps: int) -> None:
    """The same words as without compilation, and nothing changed."""
    step = gcfunc.train_step(LINEAR, F.mse_loss, gcfunc.sgd(0.1, 0.9), accumulate=2)
    compiled = gcfunc.compile(step, backend="aot_eager")
    train = compiled.init()
    for _ in range(steps):
        compiled(train, X, Y)
    before = pytree.tree_map(torch.clone, train)
    stateless = train._replace(state=None)  # type: ignore[arg-type]
    bad: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, "does not divide 'inputs' with dimension 0 of size 3", (train, X[:3], Y)),
        (TypeError, "train must come from init", (train.params, X, Y)),
        (TypeError, "state must come from init", (stateless, X, Y)),
        (ValueError, "missing 'bias'", (train._replace(params={"weight": X}), X, Y)),
    ]
    for error, message, arguments in bad:
        with pytest.raises(error, match=re.escape(message)):
            compiled(*arguments)
    torch.testing.assert_close(train, before, rtol=0.0, atol=0.0)
    compiled(train, X, Y)
    assert largest_difference(train.params, before.params) > 1e-3


@pytest.mark.usefixtures("fresh_compiler")
def test_a_buffer_that_outgrows_its_memory() -> None:
    class Growing(nn.Linear):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, self.seen])
            return super().forward(x)

    step = gcfunc.train_step(Growing(), torch.mean, gcfunc.sgd(0.1))
    assert step(step.init(), X)[0].buffers["seen"].shape == (2,)
    compiled = gcfunc.compile(step, backend="aot_eager")
    with pytest.raises(Exception, match="the forward gave buffer 'seen' another shape"):
        compiled(compiled.init(), X)


@pytest.mark.usefixtures("fresh_compiler")
def test_donated_params_in_another_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    pure = gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(0.1, gc="gc"))
    donated = gcfunc.compile(pure, backend="aot_eager")
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    donated(donated.init(), x, y)
    first = pure.init()
    params = dict(reversed(first.params.items()))
    turned = first._replace(params=params, state=pure.opt.init(params))
    expected, loss = pure(turned, x, y)
    actual, own_loss = donated(turned, x, y)
    torch.testing.assert_close(own_loss, loss)
    torch.testing.assert_close(actual.params, expected.params)


@pytest.mark.usefixtures("fresh_compiler")
def test_donated_buffers_of_another_shape() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)
            self.register_buffer("scale", torch.arange(6.0).view(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * self.get_buffer("scale").sum(1)[:2]
            return out

    pure = gcfunc.train_step(Scaled(), nn.functional.mse_loss, gcfunc.sgd(0.1))
    donated = gcfunc.compile(pure, backend="aot_eager")
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    for shape in ((2, 3), (3, 2)):
        train = pure.init()._replace(buffers={"scale": torch.arange(6.0).view(shape)})
        _, loss = pure(train, x, y)
        torch.testing.assert_close(donated(train, x, y)[1], loss)


@pytest.mark.usefixtures("fresh_compiler")
def test_donated_steps_check_hyperparameters_every_time() -> None:
    donated = gcfunc.compile(
        gcfunc.train_step(nn.Linear(2, 2), nn.functional.mse_loss, gcfunc.sgd(0.1)),
        backend="aot_eager",
    )
    train, _ = donated(donated.init(), torch.ones(1, 2), torch.ones(1, 2))
    wrong: Any = train.state.hyperparams | {"lr": 0.05}
    train = train._replace(state=train.state._replace(hyperparams=wrong))
    with pytest.raises(TypeError, match="'lr' must be a 0-d tensor"):
        donated(train, torch.ones(1, 2), torch.ones(1, 2))
