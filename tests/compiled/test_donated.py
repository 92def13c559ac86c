"""``gcfunc.compile``: in place, in one graph, equal to the pure step."""

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import metrics

import gcfunc
from gcfunc import GC, Optimizer, State, Units
from gcfunc._compiled import graph
from gcfunc._tensors.versions import COUNTS_RECOMPILES_TOGETHER, LOSES_0D_FLOAT64
from tests.cases import ALGORITHMS, GCS, Params, largest_difference, make_params, random_like

STEPS = 4


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tensors_of(params: Params, state: State) -> list[Tensor]:
    slots = [t for column in state.slots.values() for t in column.values()]
    return [*params.values(), state.step, *slots]


def difference(a: State, b: State) -> float:
    assert a.step == b.step
    return max((largest_difference(a.slots[s], b.slots[s]) for s in a.slots), default=0.0)


def assert_equals_pure(
    opt: Optimizer,
    params: Params,
    tolerance: float,
    steps: int = STEPS,
    own: Params | None = None,
    **kwargs: Any,
) -> None:
    compiled = gcfunc.compile(opt, **kwargs)
    own = {name: p.clone() for name, p in params.items()} if own is None else own
    state, own_state = opt.init(params), compiled.init(own)
    addresses = [t.data_ptr() for t in tensors_of(own, own_state)]
    for t in range(steps):
        grads = random_like(params, t)
        params, state = opt.step(params, grads, state)
        returned, own_state = compiled.step(own, grads, own_state)
        assert returned is own
        assert largest_difference(own, params) <= tolerance
        assert difference(own_state, state) <= tolerance
    assert addresses == [t.data_ptr() for t in tensors_of(own, own_state)]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("gc", ["plain", "gc", "gcc2"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_equals_the_pure_step_in_place(name: str, gc: str) -> None:
    """In float64, where a 0-d tensor's in-place write would get lost, see _compiled/views.py."""
    assert_equals_pure(ALGORITHMS[name](GCS[gc]), make_params(), 1e-12, backend="aot_eager")


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32]
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_equals_the_pure_step_on_inductor(name: str, dtype: torch.dtype) -> None:
    """In float32, graphs are compiled ahead and called without Dynamo."""
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    assert_equals_pure(ALGORITHMS[name](GCS["gc"]), make_params(dtype), tolerance)


SHAPES = [(7, 5), (1, 5), (5, 1), (1, 1), (64, 3, 3, 3), (4, 1, 3, 3), (3, 1, 1, 1), (3, 2, 5)]
SHAPES += [(2, 3, 4, 5, 3), (17, 31), (128, 256), (0, 3), (3, 0), (13,)]
LAYOUTS = ["contiguous", "channels_last", "transposed", "gapped"]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}
ALWAYS = ["sgd-momentum", "adamw", "adagrad", "ranger"]


def laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and t.ndim in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return t.contiguous(memory_format=formats[t.ndim])
    if layout == "transposed" and t.ndim > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gapped" and t.ndim > 1:
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 1, dtype=t.dtype)
        return wide[..., :-1].copy_(t)
    return t


def assert_compiles(name: str, gc: str, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in [*SHAPES, ()]]
    params, own = ({f"{i}": laid_out(t, layout) for i, t in enumerate(drawn)} for _ in range(2))
    if layout == "contiguous":
        own = {name: p.clone() for name, p in own.items()}
    assert_equals_pure(ALGORITHMS[name](GCS[gc]), params, ROUNDING[dtype], steps=2, own=own)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_it_always_compiles(dtype: torch.dtype, layout: str) -> None:
    assert_compiles("sgd-momentum", "gc", dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("name", "gc"), list(itertools.product(ALWAYS, ["gc", "gcc", "gc2"])))
def test_it_always_compiles_all(name: str, gc: str, dtype: torch.dtype, layout: str) -> None:
    assert_compiles(name, gc, dtype, layout)


def test_inductor_still_crashes_on_the_obvious_form() -> None:
    """When this fails, ``turned`` in _compiled/views.py may go (pytorch 188228)."""

    def step(p: Tensor, g: Tensor, m: Tensor) -> None:
        u = g + 0.01 * p
        m.copy_(0.9 * m + u - u.mean(1, keepdim=True))
        p.copy_(p - 0.1 * m)

    p, g, m = torch.randn(3, 64, 576).unbind()
    with pytest.raises(Exception, match="buf"):
        torch.compile(step, fullgraph=True)(p.clone(), g.clone(), m.clone())


def test_which_versions_lose_writes_to_0d_float64() -> None:
    """There 0-d tensors are handed in ``as_vector``, in _compiled/views.py."""

    def step(p: Tensor, g: Tensor) -> None:
        p.copy_(p - 0.1 * g)

    p, g = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    torch.compile(step, fullgraph=True)(p, g)
    assert p == (1.0 if LOSES_0D_FLOAT64 else 0.9)


def test_which_versions_count_recompiles_together() -> None:
    """There every graph gets a code object of its own, in _compiled/graph.py."""
    isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    assert isolates is not COUNTS_RECOMPILES_TOGETHER


@pytest.mark.parametrize("donate", [True, False])
def test_thirty_models_in_one_process(donate: bool) -> None:
    """Past torch's limit of eight compilations, which counts by the source that is compiled."""
    for n in range(1, 31):
        opt = gcfunc.compile(gcfunc.sgd(0.1, gc="gc"), donate=donate, backend="aot_eager")
        params = {"w": torch.ones(n, 2)}
        grads = {"w": torch.tensor([[1.0, 3.0]] * n)}
        params, _ = opt.step(params, grads, opt.init(params))
        torch.testing.assert_close(params["w"], torch.tensor([[1.1, 0.9]] * n))
    assert counters["stats"]["unique_graphs"] == 30


def test_thirty_models_share_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As below torch 2.13, on any version."""
    monkeypatch.setattr(graph, "COUNTS_RECOMPILES_TOGETHER", True)
    opt = gcfunc.compile(gcfunc.sgd(0.1, gc="gc"), backend="aot_eager")
    for n in range(1, 31):
        params = {"w": torch.ones(n, 2)}
        params, _ = opt.step(params, {"w": torch.tensor([[1.0, 3.0]] * n)}, opt.init(params))
        torch.testing.assert_close(params["w"], torch.tensor([[1.1, 0.9]] * n))


def test_gradients_that_are_the_params() -> None:
    """As autograd gives them for half the squared norm."""
    opt = gcfunc.sgd(0.1, 0.9)
    params = make_params()
    expected, _ = opt.step(params, params, opt.init(params))
    gcfunc.compile(opt, backend="aot_eager").step(params, params, opt.init(params))
    assert largest_difference(params, expected) < 1e-12


def test_a_schedule_never_recompiles() -> None:
    opt = gcfunc.compile(gcfunc.adamw(gc="gc"), backend="aot_eager")
    params = make_params()
    state = opt.init(params)
    params, state = opt.step(params, random_like(params, 0), state)
    with torch.compiler.set_stance("fail_on_recompile"):
        for t in range(1, 20):
            state = gcfunc.update_hyperparams(state, lr=0.1 / t, beta1=0.9 - 0.01 * t)
            before = params["linear.weight"].clone()
            params, state = opt.step(params, random_like(params, t), state)
            assert not torch.equal(params["linear.weight"], before)
        state = gcfunc.update_hyperparams(state, lr=0.0)
        before = params["linear.weight"].clone()
        opt.step(params, random_like(params, 20), state)
        assert torch.equal(params["linear.weight"], before)


def test_two_models_take_turns() -> None:
    """Other tensors of the same structure need no other graph."""
    opt = gcfunc.adamw(0.01, gc="gc")
    compiled = gcfunc.compile(opt, backend="aot_eager")
    own = [make_params(seed=s) for s in range(2)]
    own_states = [compiled.init(p) for p in own]
    pure = [make_params(seed=s) for s in range(2)]
    states = [opt.init(p) for p in pure]
    for t in range(3):
        for i in range(2):
            grads = random_like(pure[i], 10 * t + i)
            compiled.step(own[i], grads, own_states[i])
            pure[i], states[i] = opt.step(pure[i], grads, states[i])
    assert max(largest_difference(own[i], pure[i]) for i in range(2)) < 1e-12
    assert largest_difference(own[0], own[1]) > 0.1
    assert counters["stats"]["unique_graphs"] == 1


def test_parameters_without_gradient_are_left_alone() -> None:
    opt = gcfunc.ranger(0.01, k=2, gc="gc")
    compiled = gcfunc.compile(opt, backend="aot_eager")
    own, pure = make_params(), make_params()
    own_state, state = compiled.init(own), opt.init(pure)
    for t in range(5):
        grads: dict[str, Any] = dict(random_like(pure, t))
        if t % 2:
            grads["linear.weight"] = None
        compiled.step(own, grads, own_state)
        pure, state = opt.step(pure, grads, state)
        assert largest_difference(own, pure) < 1e-12
        assert difference(own_state, state) < 1e-12


@pytest.mark.parametrize("name", ["sgd-momentum", "ranger"])
def test_nothing_requires_grad_but_the_parameters(name: str) -> None:
    params = dict(torch.nn.Linear(3, 2).named_parameters())
    opt = gcfunc.compile(ALGORITHMS[name](GC()), backend="aot_eager")
    state = opt.init(params)
    copy.deepcopy(state)
    params, state = opt.step(params, {n: torch.ones_like(p) for n, p in params.items()}, state)
    assert not any(t.requires_grad for t in tensors_of({}, state))
    assert all(p.is_leaf and p.requires_grad for p in params.values())


def test_storage_that_was_replaced() -> None:
    """``param.data = other`` and ``model.to(memory_format=...)`` keep the Parameter object."""
    model = torch.nn.Conv2d(2, 3, 3, bias=False)
    params = dict(model.named_parameters())
    grads = {"weight": torch.ones_like(model.weight)}
    opt = gcfunc.compile(gcfunc.sgd(1.0), backend="aot_eager")
    state = opt.init(params)
    for change in ("nothing", "data", "layout"):
        if change == "data":
            model.weight.data = torch.zeros(3, 2, 3, 3)
        if change == "layout":
            model.to(memory_format=torch.channels_last)
        before = model.weight.detach().clone()
        opt.step(params, grads, state)
        torch.testing.assert_close(model.weight.detach(), before - 1)


def test_views_that_look_alike_have_graphs_of_their_own() -> None:
    """A 0-d tensor is handed in as a vector, a contiguous weight as its transpose."""
    opt = gcfunc.compile(gcfunc.sgd(1.0), backend="aot_eager")
    params = {"bias": torch.ones(1), "gain": torch.ones(())}
    state = opt.init(params)
    opt.step(params, {"bias": torch.ones(1), "gain": None}, state)
    opt.step(params, {"bias": None, "gain": torch.ones(())}, state)
    assert params["bias"] == params["gain"] == 0

    by_name = GC(where=lambda name, tensor: Units(dim=int(name != "w")))
    opt = gcfunc.compile(gcfunc.sgd(1.0, gc=by_name), backend="aot_eager")
    g = torch.tensor([[1.0, 3.0], [2.0, 8.0]])
    for name, expected in (("w", [[1.0, -1.0], [3.0, -3.0]]), ("v", [[0.5, 2.5], [-0.5, -2.5]])):
        w = {name: torch.zeros(2, 2) if name == "w" else torch.zeros(2, 2).t()}
        opt.step(w, {name: g}, opt.init(w))
        assert w[name].tolist() == expected


def test_slots_in_another_layout_than_their_parameter() -> None:
    """As after loading a state into a model in channels_last; see _compiled/views.py."""
    opt = gcfunc.sgd(0.1, 0.9, weight_decay=0.01, gc="gc")
    params = {"w": torch.randn(64, 96).t()}
    grads = {"w": torch.randn(96, 64)}
    state = opt.init(params)
    buffer = {"w": torch.zeros(96, 64)}
    assert buffer["w"].stride() != state.slots["momentum_buffer"]["w"].stride()
    state = state._replace(slots={"momentum_buffer": buffer})
    expected, _ = opt.step(params, grads, state)
    gcfunc.compile(opt).step(params, grads, state)
    torch.testing.assert_close(params["w"], expected["w"])


def test_parameters_that_require_grad() -> None:
    """As they come from a module: updated in place, no history, and autograd goes on."""
    model = torch.nn.Linear(3, 2)
    params = dict(model.named_parameters())
    opt = gcfunc.compile(gcfunc.sgd(0.1, gc="gc"), backend="aot_eager")
    state = opt.init(params)
    before = model.weight.detach().clone()
    for _ in range(2):
        loss = model(torch.arange(3.0)).sum()
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        params, state = opt.step(params, grads, state)
    assert model.weight.is_leaf
    assert model.weight.requires_grad
    assert not any(t.requires_grad for t in tensors_of({}, state))
    # The gradient of each row is (0, 1, 2), centralized (-1, 0, 1).
    expected = before - 2 * 0.1 * torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(model.weight.detach(), expected)


def test_gradients_in_another_layout() -> None:
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    params = {"w": torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)}
    grads = {"w": torch.randn(4, 3, 3, 3)}
    expected, _ = opt.step(params, grads, opt.init(params))
    gcfunc.compile(opt, backend="aot_eager").step(params, grads, opt.init(params))
    torch.testing.assert_close(params["w"], expected["w"])


@pytest.mark.parametrize("donate", [True, False])
def test_masks(donate: bool) -> None:
    """Units per column and per group, as select gives them for transposed convolutions."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 4),
        torch.nn.ConvTranspose2d(4, 6, 3, groups=2),
        torch.nn.ConvTranspose2d(6, 4, 3),
        torch.nn.Linear(4, 3),
    )
    params = {n: p.detach().double() for n, p in model.named_parameters()}
    opt = gcfunc.sgd(0.1, 0.9, gc=GC(where=gcfunc.select(model)))
    expected, _ = opt.step(params, random_like(params, 0), opt.init(params))
    plain = gcfunc.sgd(0.1, 0.9)
    other, _ = plain.step(params, random_like(params, 0), plain.init(params))
    assert largest_difference(expected, other) > 0.01
    compiled = gcfunc.compile(opt, donate=donate)
    stepped, _ = compiled.step(params, random_like(params, 0), opt.init(params))
    assert largest_difference(stepped, expected) < 1e-12


def test_undonated_is_pure() -> None:
    opt = gcfunc.compile(gcfunc.sgd(0.1, 0.9, gc="gc"), donate=False, backend="aot_eager")
    params = make_params()
    state = opt.init(params)
    copies = [t.clone() for t in tensors_of(params, state)]
    new, new_state = opt.step(params, random_like(params, 0), state)
    assert all(map(torch.equal, tensors_of(params, state), copies))
    assert largest_difference(new, params) > 0.01
    assert new_state.step == 1


def test_memory_that_is_shared_is_refused() -> None:
    opt = gcfunc.compile(gcfunc.sgd(0.1, 0.9), backend="aot_eager")
    w = torch.ones(4, 3)
    shared = {"a": w, "b": w[1:]}
    with pytest.raises(ValueError, match="may share memory"):
        opt.step(shared, {n: torch.ones_like(p) for n, p in shared.items()}, opt.init(shared))
    wide = {"a": torch.ones(1, 3).expand(4, 3)}
    with pytest.raises(ValueError, match="overlaps itself"):
        opt.step(wide, {"a": torch.ones(4, 3)}, opt.init(wide))
    rows = {"a": w[:2], "b": w[2:]}
    opt.step(rows, {n: torch.ones_like(p) for n, p in rows.items()}, opt.init(rows))
    torch.testing.assert_close(w, torch.full((4, 3), 0.9))


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(1, 3), r"'w' has shape \(1, 3\), but its parameter has \(2, 3\)"),
        (torch.ones(2, 3).double(), "'w' has dtype torch.float64"),
        (torch.ones(2, 3).to_sparse(), "'w' has layout"),
        ([torch.ones(2, 3)], "grads does not match params"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_bad_gradients_change_nothing(grad: Any, message: str, steps: int) -> None:
    """Before the first step and after one, when the graph exists."""
    opt = gcfunc.compile(gcfunc.sgd(0.1, 0.9, gc="gc"), backend="aot_eager")
    params = {"w": torch.randn(2, 3)}
    state = opt.init(params)
    for _ in range(steps):
        opt.step(params, {"w": torch.randn(2, 3)}, state)
    copies = [t.clone() for t in tensors_of(params, state)]
    with pytest.raises((ValueError, TypeError), match=message):
        opt.step(params, {"w": grad}, state)
    assert all(map(torch.equal, tensors_of(params, state), copies))


@pytest.mark.parametrize(
    "kwargs", [{"mode": "reduce-overhead"}, {"options": {"dce": True}}], ids=str
)
def test_modes_and_options_of_torch(kwargs: dict[str, Any]) -> None:
    assert_equals_pure(gcfunc.adamw(0.01, gc="gc"), make_params(), 1e-12, **kwargs)


def test_moments_are_not_read_back_from_memory() -> None:
    """Two loops for a weight, its mean and its update: what INDUCTOR_OPTIONS are for."""
    opt = gcfunc.adamw(0.01, gc="gc")
    params = {"a": torch.randn(8, 32), "b": torch.randn(8, 48)}
    loops = []
    for options in ({}, {"realize_reads_threshold": 4, "realize_opcount_threshold": 30}):
        torch.compiler.reset()
        metrics.reset()
        compiled = gcfunc.compile(opt, options={"fx_graph_cache": False, **options})
        compiled.step(params, random_like(params, 0), opt.init(params))
        loops.append(metrics.generated_kernel_count)
    assert loops[0] < loops[1]


@pytest.mark.parametrize("steps", [0, 1])
def test_what_is_no_state_is_refused(steps: int) -> None:
    opt = gcfunc.compile(gcfunc.sgd(0.1, 0.9), backend="aot_eager")
    params = {"w": torch.ones(2, 3)}
    for _ in range(steps):
        opt.step(params, {"w": torch.ones(2, 3)}, opt.init(params))
    before = params["w"].clone()
    with pytest.raises(TypeError, match="state must come from init or step, got NoneType"):
        opt.step(params, {"w": torch.ones(2, 3)}, None)  # type: ignore[arg-type]
    assert torch.equal(params["w"], before)


def test_only_optimizers_are_compiled() -> None:
    opt = gcfunc.compile(gcfunc.sgd(0.1))
    for wrong in (opt, torch.optim.SGD, None):
        with pytest.raises(TypeError, match="opt must be an optimizer"):
            gcfunc.compile(wrong)  # type: ignore[call-overload]
