"""Donated steps on the CPU: graphs compiled ahead, shared by parts that are alike."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gcfunc
from gcfunc._compiled.repeats import repeats
from gcfunc._tensors.versions import TORCH
from tests.cases import Params, largest_difference, random_like

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def transformer(blocks: int, width: int = 8) -> Params:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(width, 2, 2 * width) for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(3, width), *layers)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_compiling_follows_the_kinds_of_tensors_not_their_number() -> None:
    opt = gcfunc.adamw(0.01, gc="gc")
    counts = []
    for blocks in (4, 12):
        params = transformer(blocks)
        counters.clear()
        compiled = gcfunc.compile(opt)
        own = {name: p.clone() for name, p in params.items()}
        own_state, state = compiled.init(own), opt.init(params)
        places = [p.data_ptr() for p in own.values()]
        for seed in range(3):
            grads = random_like(params, seed)
            compiled.step(own, grads, own_state)
            params, state = opt.step(params, grads, state)
        assert largest_difference(own, params) < 1e-5
        assert places == [p.data_ptr() for p in own.values()]
        assert not counters["graph_break"]
        counts.append(counters["stats"]["calls_captured"])
    # For three times the tensors. torch 2.11 cannot compile ahead, and has one graph for all.
    assert (counts[1] < 2 * counts[0]) is (TORCH >= (2, 12))
    plain, _ = gcfunc.adamw(0.01).step(params, grads, gcfunc.adamw(0.01).init(params))
    once, _ = opt.step(params, grads, opt.init(params))
    assert largest_difference(plain, once) > 1e-3


@pytest.mark.parametrize(
    ("counts", "compiled", "called"),
    [
        ((1, 1, 1), 3, 1),
        ((12, 12, 24, 1, 1), 26, 3),
        ((36, 36, 72, 1, 1), 38, 5),
        ((2, 2), 4, 1),  # one more call would cost more than two tensors
        ((5,), 5, 1),
        ((64,), 32, 2),
        ((0, 3), 3, 1),
    ],
)
def test_parts(counts: tuple[int, ...], compiled: int, called: int) -> None:
    found = repeats(counts)
    assert tuple(sum(r * taken[i] for r, taken in found) for i in range(len(counts))) == counts
    assert sum(sum(taken) for _, taken in found) <= compiled
    assert sum(r for r, _ in found) <= called


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_gradients_in_other_layouts_are_compiled_for() -> None:
    """The graphs are called without most of Dynamo's guards; those on gradients are left."""
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    compiled = gcfunc.compile(opt)
    params = {"a": torch.randn(4, 4), "b": torch.randn(4, 4), "c": torch.randn(2, 3, 2, 2)}
    own = {name: p.clone() for name, p in params.items()}
    state, own_state = opt.init(params), compiled.init(own)

    def step(grads: Params) -> int:
        nonlocal params, state
        before = graphs()
        params, state = opt.step(params, grads, state)
        compiled.step(own, grads, own_state)
        assert largest_difference(own, params) < 1e-6
        return graphs() - before

    same = torch.randn(4, 4)
    turned = {"a": torch.randn(4, 4).t(), "b": torch.randn(4, 4)}
    last = random_like(params, 2)["c"].contiguous(memory_format=torch.channels_last)
    assert step(random_like(params, 0)) == 1
    assert step(random_like(params, 1)) == 0
    assert step(random_like(params, 1) | turned) == 1
    assert step(random_like(params, 3) | {"c": last}) == 1
    step(random_like(params, 4) | {"a": same, "b": same})
    assert step(random_like(params, 5)) == 0
    assert step(random_like(params, 6) | {"a": own["b"], "b": own["a"]}) == 0
    assert step(random_like(params, 1) | turned) == 0
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert step(random_like(params, 7)) == 1


def test_one_gradient_for_two_parameters_at_first() -> None:
    opt = gcfunc.sgd(0.1)
    compiled = gcfunc.compile(opt)
    own = {"a": torch.zeros(2), "b": torch.zeros(2)}
    state = compiled.init(own)
    same = torch.ones(2)
    compiled.step(own, {"a": same, "b": same}, state)
    compiled.step(own, {"a": torch.ones(2), "b": -torch.ones(2)}, state)
    torch.testing.assert_close(own, {"a": torch.full((2,), -0.2), "b": torch.zeros(2)})


def test_more_models_than_torch_recompiles_for() -> None:
    compiled = gcfunc.compile(gcfunc.sgd(0.1))
    for n in range(1, 12):
        params = {"w": torch.ones(n)}
        compiled.step(params, {"w": torch.ones(n)}, compiled.init(params))
        torch.testing.assert_close(params["w"], torch.full((n,), 0.9))
    assert graphs() == 11


def test_each_model_has_its_own_sizes() -> None:
    """Not sizes that Dynamo made symbols of, after the first model."""
    opt = gcfunc.sgd(0.1, 0.9, weight_decay=0.1, gc="gc")
    for shapes in ([(3, 2, 3), (5, 6)], [(8, 6)], [(5, 6)]):
        params = {f"{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
        own = {name: p.clone() for name, p in params.items()}
        compiled = gcfunc.compile(opt)
        own_state, state = compiled.init(own), opt.init(params)
        for t in range(3):
            grads = random_like(params, t)
            compiled.step(own, grads, own_state)
            params, state = opt.step(params, grads, state)
        assert largest_difference(own, params) < 1e-6


@pytest.mark.parametrize("bad", ["first.weight", "last.bias"])
@pytest.mark.parametrize("step", [0, 1])
def test_nothing_is_written_before_everything_is_compiled(bad: str, step: int) -> None:
    names = [f"{part}.{kind}" for part in ("first", "more", "last") for kind in ("weight", "bias")]
    own: dict[str, Tensor] = {
        f"{i}.{n}": torch.ones(2, 3) if n.endswith("weight") else torch.ones(2)
        for i in range(4)
        for n in names
    }
    compiled = gcfunc.compile(gcfunc.sgd(0.1, 0.9))
    state = compiled.init(own)
    for _ in range(step):
        compiled.step(own, random_like(own, 0), state)
    assert step == 0 or graphs() == 1
    before = {name: t.clone() for name, t in gcfunc.state_dict(state).items()} | {
        name: p.clone() for name, p in own.items()
    }
    with pytest.raises(ValueError, match=f"grads: '3.{bad}' has shape"):
        compiled.step(own, random_like(own, 1) | {f"3.{bad}": torch.ones(7)}, state)
    assert largest_difference(before, gcfunc.state_dict(state) | own) == 0


def without_caches(patch: pytest.MonkeyPatch) -> AbstractContextManager[object]:
    off: AbstractContextManager[object] = torch._inductor.config.patch(force_disable_caches=True)
    return off


def without_aot_compile(patch: pytest.MonkeyPatch) -> AbstractContextManager[object]:
    compiler: Any = torch.compile

    def bare(function: Any, **kwargs: Any) -> Callable[..., Any]:
        compiled = compiler(function, **kwargs)
        return lambda *args: compiled(*args)

    patch.setattr(torch, "compile", bare)
    return nullcontext()


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("without", [without_caches, without_aot_compile])
def test_where_graphs_cannot_be_compiled_ahead(
    without: Callable[[pytest.MonkeyPatch], AbstractContextManager[object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opt = gcfunc.adamw(0.1, gc="gc")
    params = transformer(1)
    own = {name: p.clone() for name, p in params.items()}
    compiled = gcfunc.compile(opt)
    own_state, state = compiled.init(own), opt.init(params)
    with without(monkeypatch):
        for seed in range(2):
            grads = random_like(params, seed)
            compiled.step(own, grads, own_state)
            params, state = opt.step(params, grads, state)
    assert largest_difference(own, params) < 1e-5
    assert graphs() == 1


Change = Callable[[Params, gcfunc.State], gcfunc.State]


def other_hyperparams(**values: Tensor) -> Change:
    def change(params: Params, state: gcfunc.State) -> gcfunc.State:
        return state._replace(hyperparams=state.hyperparams | values)

    return change


def moved(params: Params, state: gcfunc.State) -> gcfunc.State:
    for t in [*params.values(), *state.slots["momentum_buffer"].values()]:
        t.data = t.data.clone()
    return state


def transposed(params: Params, state: gcfunc.State) -> gcfunc.State:
    params["a"].t_()
    return state


@pytest.mark.parametrize(
    "change",
    [
        other_hyperparams(lr=torch.tensor(1)),
        other_hyperparams(lr=torch.tensor(0.5), momentum=torch.tensor(0.25)),
        moved,
        transposed,
    ],
    ids=["integer lr", "float32 hyperparameters", "moved", "transposed"],
)
def test_what_changes_between_steps_is_seen(change: Change) -> None:
    """Though nobody but the plan looks at params and state."""
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    compiled = gcfunc.compile(opt)
    params = {"a": torch.randn(4, 4), "b": torch.randn(3, 2)}
    own = {name: p.clone() for name, p in params.items()}
    same = torch.tensor(0.5)
    shared = other_hyperparams(lr=same, momentum=same)
    state, own_state = (shared(p, opt.init(p)) for p in (params, own))
    for t in range(3):
        grads = random_like(params, t)
        params, state = opt.step(params, grads, state)
        compiled.step(own, grads, own_state)
        assert largest_difference(own, params) < 1e-6
        if t == 1:
            state, own_state = change(params, state), change(own, own_state)


def test_hyperparameters_are_checked_in_every_step() -> None:
    compiled = gcfunc.compile(gcfunc.sgd(0.1))
    params = {"w": torch.ones(2)}
    state = compiled.init(params)
    compiled.step(params, params, state)
    wrongs: list[Any] = [0.1, torch.ones(2)]
    for lr in wrongs:
        wrong = state._replace(hyperparams=state.hyperparams | {"lr": lr})
        with pytest.raises(TypeError, match="'lr' must be a 0-d tensor"):
            compiled.step(params, params, wrong)


@pytest.mark.parametrize("first", [0, 1])
def test_gradients_that_are_views_of_params(first: int) -> None:
    opt = gcfunc.sgd(0.1, gc="gc")
    compiled = gcfunc.compile(opt)
    params = {"a": torch.randn(6, 4), "b": torch.randn(5, 4)}
    own = {name: p.clone() for name, p in params.items()}
    state, own_state = opt.init(params), compiled.init(own)
    for t in range(3):
        grads = random_like(params, t)
        own_grads = grads
        if t >= first:
            grads, own_grads = grads | {"b": params["a"][1:]}, grads | {"b": own["a"][1:]}
        params, state = opt.step(params, grads, state)
        compiled.step(own, own_grads, own_state)
        assert largest_difference(own, params) < 1e-6


@pytest.mark.parametrize("at", ["gradient", "update"])
def test_rows_in_blocks(at: Literal["gradient", "update"]) -> None:
    opt = gcfunc.adamw(0.01, gc=gcfunc.GC(lambda name, tensor: gcfunc.Units(0, 2), at=at))
    rows = gcfunc.adamw(0.01, gc=gcfunc.GC("gc", at=at))
    compiled = gcfunc.compile(opt)
    params = {"a": torch.randn(6, 8, 3, 3), "b": torch.randn(4, 70)}
    own = {name: p.clone() for name, p in params.items()}
    state, own_state = rows.init(params), compiled.init(own)
    for t in range(2):
        grads = random_like(params, t)
        params, state = rows.step(params, grads, state)
        compiled.step(own, grads, own_state)
    assert largest_difference(own, params) < 1e-6


@pytest.mark.parametrize("kwargs", [{"fullgraph": False}, {"disable": True}, {"dynamic": True}])
def test_other_ways_to_compile(kwargs: dict[str, bool]) -> None:
    opt = gcfunc.sgd(0.1, gc="gc")
    params = {"a": torch.randn(3, 2)}
    grads = random_like(params, 0)
    expected, _ = opt.step(params, grads, opt.init(params))
    compiled = gcfunc.compile(opt, **kwargs)
    compiled.step(params, grads, compiled.init(params))
    assert largest_difference(params, expected) < 1e-6
