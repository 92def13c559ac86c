"""When the drop-ins compile, that they do it once, and what happens where they cannot."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import gcfunc
from gcfunc import optim
from gcfunc._compiled import planned
from gcfunc._compiled.plan import Plan
from gcfunc.optim import base, inplace
from tests.optim.training import EXACT, copies, difference, leaves, set_grads, train, values


class Calls:
    """Stands in for compiled steps: counts, over all of them, and does not compile."""

    def __init__(self, error: Exception | None = None) -> None:
        self.made: list[gcfunc.Optimizer] = []
        self.called: list[int] = []
        self._error = error

    def __call__(self, opt: gcfunc.Optimizer, _: Any, graphs: Any, units: Any) -> "Calls":
        self.made.append(opt)
        self._eager = inplace.eager(opt, units)
        return self

    def step(self, flat: Any, grads: Any, state: Any) -> None:
        self.called.append(len(grads))
        if self._error:
            raise self._error
        self._eager(flat, grads, state)


@pytest.mark.parametrize(
    ("asked", "least", "compiled"),
    [
        (None, 47, [True, True]),
        (None, 48, [False, False]),
        (None, 1_000_000, [False, False]),
        (True, 1_000_000, [True, True]),
        (False, 1, [False, False]),
    ],
)
def test_large_models_are_compiled_by_default(
    asked: bool | None, least: int, compiled: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert base.COMPILE_FROM == 1_000_000
    calls = Calls()
    monkeypatch.setattr(inplace, "Planned", calls)
    monkeypatch.setattr(base, "COMPILE_FROM", least)
    params = {"a": torch.zeros(6, 7), "b": torch.zeros(5)}
    for p in params.values():
        p.requires_grad_()
    groups = [{"params": [p]} for p in params.values()]
    train(optim.SGD(groups, lr=0.1, compile=asked), params, range(3))
    assert len(calls.made) == sum(compiled)
    assert len(calls.called) == 3 * sum(compiled)


Failure = torch._dynamo.exc.BackendCompilerFailed


def test_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(Failure(lambda: None, RuntimeError("no compiler"), None))
    monkeypatch.setattr(inplace, "Planned", calls)
    monkeypatch.setattr(base, "COMPILE_FROM", 1)
    params, same = leaves(), leaves()
    opt = optim.Adam(params.values(), gc="gc")
    set_grads(params, 0)
    with pytest.warns(UserWarning, match=r"not compiled.*no compiler.*compile=False says so"):
        opt.step()
    train(opt, params, range(1, 3))
    assert len(calls.called) == 1
    train(optim.Adam(same.values(), gc="gc", compile=False), same, range(3))
    assert difference(values(opt), [*same.values()]) == 0


def test_falls_back_where_there_is_no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torch.compile is not supported on Python 4")

    monkeypatch.setattr(torch, "compile", unsupported)
    monkeypatch.setattr(base, "COMPILE_FROM", 1)
    params = leaves()
    opt = optim.Adam(params.values(), gc="gc")
    with pytest.warns(UserWarning, match=r"not compiled.*Python 4.*compile=False says so"):
        train(opt, params, range(1))
    train(opt, params, range(1, 3))
    with pytest.raises(RuntimeError, match="Python 4"):
        train(optim.Adam(params.values(), gc="gc", compile=True), params, range(1))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_falls_back_without_a_c_compiler(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "COMPILE_FROM", 1)
    nowhere = {"cpp.cxx": ("/nowhere/c++",), "fx_graph_cache": False}
    # What other tests have compiled must not be found either.
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch._inductor.config.patch(nowhere), uncached:
        params = {"weight": torch.zeros(4, 3, dtype=dtype).requires_grad_()}
        with pytest.warns(UserWarning, match="not compiled.*compiler"):
            train(optim.SGD(params.values(), lr=0.1, gc="gc"), params, range(1))
        with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="compiler"):
            train(optim.SGD(params.values(), lr=0.1, compile=True), params, range(1))


def test_compile_true_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = Failure(lambda: None, RuntimeError("no compiler"), None)
    monkeypatch.setattr(inplace, "Planned", Calls(failure))
    params = leaves()
    opt = optim.SGD(params.values(), lr=0.1, momentum=0.9, compile=True)
    before = values(opt)
    with pytest.raises(Failure, match="no compiler"):
        train(opt, params, range(1))
    assert difference(values(opt), before) == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_groups_that_are_alike_share_a_graph_and_loading_keeps_it() -> None:
    params = [torch.ones(4, 3).cumsum(0).requires_grad_() for _ in range(3)]
    opt = optim.AdamW([{"params": [p], "lr": 0.1} for p in params], compile=True, gc="gc")
    for p in params:
        p.grad = torch.randn(4, 3)
    opt.step()
    assert counters["stats"]["unique_graphs"] == 1
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_failing_compiler_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(Failure(lambda: None, RuntimeError("no compiler"), None))
    monkeypatch.setattr(inplace, "Planned", calls)
    monkeypatch.setattr(base, "COMPILE_FROM", 1)
    params = leaves()
    opt = optim.Adam([{"params": [p]} for p in params.values()], gc="gc")
    with pytest.warns(UserWarning, match="no compiler") as warned:
        train(opt, params, range(3))
    assert len(warned) == len(calls.called) == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_parameters_of_several_ages_do_not_plan_anew_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = []

    class Counted(Plan):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            plans.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(planned, "Plan", Counted)
    params = leaves()
    late = next(iter(params.values()))
    opt = optim.AdamW(params.values(), compile=True, gc="gc")
    for seed in range(5):
        set_grads(params, seed)
        if seed == 0:
            late.grad = None
        opt.step()
        if seed == 1:
            made = len(plans)
    assert len(plans) == made >= 2


@pytest.mark.parametrize("name", ["SGD", "AdamW_GC"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_steps_are_in_place_and_never_recompile(name: str) -> None:
    shapes = {"conv": (4, 3, 2, 2), "bias": (5,)}
    start = {n: torch.ones(shape).cumsum(0).requires_grad_() for n, shape in shapes.items()}
    options = {"momentum": 0.9, "weight_decay": 0.1} if name == "SGD" else {"weight_decay": 0.1}
    results, both = [], []
    for compiled in (True, False):
        params = copies(start)
        opt = getattr(optim, name)(params.values(), **options, gc="gc", compile=compiled)
        both.append((opt, params))
        (group,) = opt.param_groups
        places = [p.data_ptr() for p in params.values()]
        train(opt, params, range(1))
        graphs = counters["stats"]["unique_graphs"]
        assert bool(graphs) == compiled
        slots = [t for e in opt.state.values() for s, t in e.items() if s != "step"]
        places += [t.data_ptr() for t in slots]
        for seed in range(1, 6):
            group["lr"] = 0.1 / seed if seed != 4 else torch.tensor(0.01)
            group["weight_decay"] = 0.1 * seed
            group |= {"momentum": 0.5 + seed / 20} if name == "SGD" else {"betas": (0.5, 0.9)}
            train(opt, params, [seed])
        assert counters["stats"]["unique_graphs"] == graphs
        slots = [t for e in opt.state.values() for s, t in e.items() if s != "step"]
        assert places == [t.data_ptr() for t in [*params.values(), *slots]]
        results.append(values(opt) + slots)
        counters.clear()
    assert difference(*results) < 1e-5
    assert difference(results[0][:2], [*start.values()]) > 1e-2
    # Another pattern of gradients, and other counts.
    for opt, params in both:
        train(opt, params, range(6, 8), only=["bias"])
        train(opt, params, range(8, 10))
    assert difference(*[values(opt) for opt, _ in both]) < 1e-5


def test_inside_a_users_compiled_function() -> None:
    params, same = leaves(), leaves()
    opt = optim.SGD(params.values(), lr=0.1, momentum=0.9, gc="gc", compile=False)

    @torch.compile(backend="eager")
    def update() -> None:
        opt.step()

    for seed in range(3):
        set_grads(params, seed)
        update()
    train(optim.SGD(same.values(), lr=0.1, momentum=0.9, gc="gc", compile=False), same, range(3))
    assert difference(values(opt), [*same.values()]) <= EXACT
