"""What the drop-ins save is what torch.optim saves; copies and loaded ones go on exactly."""

import copy
import gc as collector
import itertools
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.optim import Optimizer

from gcfunc import GC, optim
from gcfunc._catalog import CATALOG, Algorithm
from tests.cases import Params
from tests.optim.training import (
    EXACT,
    PLAIN,
    copies,
    difference,
    kind_of,
    leaves,
    require_same_state,
    saved,
    set_grads,
    train,
    values,
)

Build = Callable[[Params], Optimizer]

CHOICES: list[Callable[[Params], Any]] = [
    lambda params: "gc",
    lambda params: GC(dict.fromkeys(params, True)),
    lambda params: "gcc",
    lambda params: GC("gc", at="update"),
]


def _build(row: Algorithm, options: Mapping[str, Any], choice: Callable[[Params], Any]) -> Build:
    return lambda params: row.make_drop_in(params.items(), **options, gc=choice(params))


# Every class, with all that its state can have, and one of each kind of GC.
OWN: dict[str, Build] = {
    **{
        kind_of(row, variant): _build(row, options, choice)
        for (row, variant, options), choice in zip(
            ((row, *variant) for row in CATALOG.values() for variant in row.variants.items()),
            itertools.cycle(CHOICES),
        )
    },
    "AdamW_GC2": lambda params: optim.AdamW_GC2(params.values(), lr=0.1, weight_decay=0.1),
    "Adagrad_GC": lambda params: optim.Adagrad_GC(params.values(), lr_decay=0.1),
    "groups": lambda params: optim.AdamW(
        [
            {"params": [p for p in params.values() if p.ndim >= 2], "lr": 0.2},
            {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0, "gc": None},
        ],
        gc="gc",
    ),
}


def uneven(opt: Optimizer, params: Params) -> Optimizer:
    """Training in which parameters take different numbers of steps."""
    train(opt, params, range(2), only=["linear.weight", "linear.bias"])
    train(opt, params, range(2, 4), only=[n for n in params if n != "linear.bias"])
    return train(opt, params, range(4, 5))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(
    ("first", "second"), [(optim, torch.optim), (torch.optim, optim)], ids=["to torch", "from"]
)
def test_resumes_across(first: Any, second: Any, kind: str) -> None:
    name, options = PLAIN[kind]
    params = leaves()
    opt = uneven(getattr(first, name)(params.values(), **options), params)
    other = copies(params)
    resumed = getattr(second, name)(other.values(), lr=0.9)
    resumed.load_state_dict(saved(opt))
    require_same_state(resumed.state_dict(), opt.state_dict(), within=0)
    train(opt, params, range(5, 9))
    train(resumed, other, range(5, 9))
    assert difference(values(resumed), values(opt)) <= EXACT
    require_same_state(resumed.state_dict(), opt.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", OWN.values(), ids=OWN.keys())
def test_resumes_exactly_from_a_file(build: Build, dtype: torch.dtype, tmp_path: Path) -> None:
    params = leaves(dtype)
    opt = uneven(build(params), params)
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    other = copies(params)
    resumed = build(other)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(opt, params, range(5, 9))
    train(resumed, other, range(5, 9))
    assert difference(values(resumed), values(opt)) == 0
    require_same_state(resumed.state_dict(), opt.state_dict(), within=0)


def by_copying(model: nn.Module, opt: Optimizer) -> tuple[nn.Module, Optimizer]:
    return copy.deepcopy((model, opt))


def by_pickling(model: nn.Module, opt: Optimizer) -> tuple[nn.Module, Optimizer]:
    return pickle.loads(pickle.dumps((model, opt)))


@pytest.mark.parametrize("copied", [by_copying, by_pickling], ids=lambda copied: copied.__name__)
@pytest.mark.parametrize("build", OWN.values(), ids=OWN.keys())
def test_a_copy_goes_on_alike(build: Build, copied: Callable[..., Any]) -> None:
    model = nn.ParameterDict({n.replace(".", "_"): p for n, p in leaves().items()})
    names = {name.replace(".", "_"): name for name in leaves()}

    def params(of: nn.Module) -> Params:
        return {names[name]: p for name, p in of.named_parameters()}

    opt = uneven(build(params(model)), params(model))
    other_model, other = copied(model, opt)
    assert type(other) is type(opt)
    before = values(other)
    train(opt, params(model), range(5, 9))
    assert difference(values(other), before) == 0
    train(other, params(other_model), range(5, 9))
    assert difference(values(opt), values(other)) == 0
    assert difference([*model.parameters()], [*other_model.parameters()]) == 0
    require_same_state(opt.state_dict(), other.state_dict(), within=0)
    assert difference(values(opt), before) > 1e-3


@pytest.mark.parametrize("build", OWN.values(), ids=OWN.keys())
def test_gc_is_for_code_to_say(build: Build) -> None:
    params = leaves()
    opt = uneven(build(params), params)
    gcs = [group["gc"] for group in opt.param_groups]
    state = opt.state_dict()
    assert all(group["gc"] is None for group in state["param_groups"])
    assert [group["gc"] for group in opt.param_groups] == gcs
    opt.load_state_dict(state)
    assert [group["gc"] for group in opt.param_groups] == gcs


def test_what_is_loaded_keeps_its_own_gc() -> None:
    params, same, plain = leaves(), leaves(), leaves()
    opt = train(optim.SGD(params.values(), lr=0.1, momentum=0.9), params, range(1))
    for own, gc in ((same, "gc"), (plain, None)):
        other = optim.SGD(own.values(), lr=0.1, momentum=0.9, gc=gc)
        other.load_state_dict(opt.state_dict())
        train(other, own, range(1))
        assert other.param_groups[0]["gc"] == gc
    assert difference([*same.values()], [*plain.values()]) > 1e-3


@pytest.mark.parametrize("build", OWN.values(), ids=OWN.keys())
def test_what_was_loaded_is_not_shared(build: Build) -> None:
    """Torch's classes share it: two that go on from one dict ruin each other's moments."""
    params = leaves()
    opt = train(build(params), params, range(3))
    state = opt.state_dict()
    want = copy.deepcopy(state)
    others = []
    for _ in range(2):
        own = leaves()
        other = build(own)
        other.load_state_dict(state)
        others.append(train(other, own, range(3, 6)))
    require_same_state(state, want, within=0)
    assert difference(*map(values, others)) == 0
    before = [t for entry in others[1].state_dict()["state"].values() for t in entry.values()]
    kept = copy.deepcopy(before)
    train(others[0], params, range(6, 7))
    assert all(map(torch.equal, before, kept))


def test_saved_names_do_not_move_gc() -> None:
    """A checkpoint of a wrapped model has other names."""
    model = nn.Linear(3, 2)
    wrapped = [(f"module.{name}", p) for name, p in copy.deepcopy(model).named_parameters()]
    earlier = torch.optim.SGD(wrapped, lr=0.1).state_dict()
    results = []
    for mask in ({"weight": True, "bias": False}, {"weight": False, "bias": False}):
        own = copy.deepcopy(model)
        groups = [{"params": [*own.named_parameters()], "gc": GC(mask)}]
        named = [("other", nn.Parameter(torch.zeros(2, 2)))]
        opt = optim.SGD([*groups, {"params": named, "gc": "gc"}], lr=0.1)
        opt.load_state_dict(
            {
                "state": {},
                "param_groups": [
                    *earlier["param_groups"],
                    {**earlier["param_groups"][0], "params": [2], "param_names": ["module.other"]},
                ],
            }
        )
        own(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        opt.step()
        results.append([*own.parameters()])
    assert difference(*results) > 1e-3


def test_no_counter_is_shared() -> None:
    params = leaves()
    opt = train(optim.Adam(params.values()), params, range(3))
    steps = [entry["step"] for entry in opt.state_dict()["state"].values()]
    assert len({t.data_ptr() for t in steps}) == len(params)
    assert {float(t) for t in steps} == {3.0}
    before = saved(opt)
    train(opt, params, range(1))
    assert [float(t) for t in steps] == [3.0] * len(params)
    assert {float(entry["step"]) for entry in before["state"].values()} == {3.0}


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if "SGD" not in kind])
def test_counters_of_old_checkpoints_are_numbers(kind: str) -> None:
    name, options = PLAIN[kind]
    results = []
    for module in (optim, torch.optim):
        params = leaves()
        opt = train(getattr(module, name)(params.values(), **options), params, range(2))
        state = saved(opt)
        for entry in state["state"].values():
            entry["step"] = int(entry["step"])
        opt.load_state_dict(state)
        results.append(values(train(opt, params, range(2, 4))))
    assert difference(*results) <= EXACT


def test_an_old_checkpoint_of_sgd_has_no_buffers() -> None:
    results = []
    for module in (optim, torch.optim):
        params = leaves()
        opt = module.SGD(params.values(), lr=0.1, momentum=0.9, dampening=0.5)
        state = opt.state_dict()
        state["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
        opt.load_state_dict(state)
        train(opt, params, range(3))
        results.append(opt)
    assert difference(*map(values, results)) <= EXACT
    require_same_state(results[0].state_dict(), results[1].state_dict())


def test_state_that_is_no_parameters() -> None:
    results = []
    for module in (optim, torch.optim):
        params = leaves()
        opt: Optimizer = module.Adam(params.values())
        opt.state["epoch"] = 3  # type: ignore[index]
        train(opt, params, range(2))
        opt.load_state_dict(saved(opt))
        results.append(train(opt, params, range(2)))
        assert results[-1].state_dict()["state"]["epoch"] == 3
    assert difference(*map(values, results)) <= EXACT


@pytest.mark.parametrize("build", OWN.values(), ids=OWN.keys())
def test_distributed_checkpoints_take_it(build: Build) -> None:
    model = nn.ParameterDict({n.replace(".", "_"): p for n, p in leaves().items()})
    other = copy.deepcopy(model)
    results = []
    state: Any = None
    for module in (model, other):
        names = zip(leaves(), module.values(), strict=True)
        params = dict(names)
        opt = build(params)
        if state is None:
            train(opt, params, range(2))
            state = copy.deepcopy(checkpoint.get_optimizer_state_dict(module, opt))
            for p, new in zip(params.values(), other.values(), strict=True):
                new.data.copy_(p.data)
        else:
            checkpoint.set_optimizer_state_dict(module, opt, state)
        results.append(values(train(opt, params, range(2, 4))))
    assert difference(*results) == 0


def hooked(opt: Optimizer, params: Params) -> list[Any]:
    """What all of torch's hooks see, in order."""
    seen: list[Any] = []

    def keys(state: Mapping[str, Any]) -> list[Any]:
        return [*state, sorted({*state["param_groups"][0]} - {"gc"}), [*state["state"]]]

    def after_saving(opt: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(keys(state))
        return {**state, "epoch": 3}

    def before_loading(opt: Optimizer, state: dict[str, Any]) -> None:
        seen.append(("loading", state.pop("epoch")))

    opt.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
    opt.register_state_dict_post_hook(after_saving)
    opt.register_load_state_dict_pre_hook(before_loading)
    opt.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    opt.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before"))
    opt.register_step_post_hook(lambda opt, args, kwargs: seen.append(("after", len(opt.state))))
    train(opt, params, range(2))
    opt.load_state_dict(opt.state_dict())
    train(opt, params, range(2))
    return seen


def test_hooks() -> None:
    params, same = leaves(), leaves()
    seen = hooked(optim.Adam(params.values()), params)
    assert seen == hooked(torch.optim.Adam(same.values()), same)
    assert len(seen) == 12
    assert difference([*params.values()], [*same.values()]) <= EXACT


def test_steps_are_profiled_by_their_name() -> None:
    params = leaves()
    opt = train(optim.SGDW_GC(params.values(), lr=0.1), params, range(1))
    set_grads(params, 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        opt.step()
        opt.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#SGDW_GC.step", "Optimizer.zero_grad#SGDW_GC.zero_grad"} <= names


def test_a_failed_load_changes_nothing() -> None:
    params, same = leaves(), leaves()
    opt, other = (OWN["groups"](own) for own in (params, same))
    for each, own in ((opt, params), (other, same)):
        train(each, own, range(2))
    state = saved(opt)
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        opt.load_state_dict(state)
    require_same_state(opt.state_dict(), other.state_dict(), within=0)
    for each, own in ((opt, params), (other, same)):
        train(each, own, range(2, 4))
    assert difference(values(opt), values(other)) == 0


def test_the_saved_dict_is_made_of_plain_types() -> None:
    params = leaves()
    opt = train(OWN["Ranger"](params), params, range(2))

    def kinds(value: Any) -> set[type]:
        if isinstance(value, Mapping):
            return set().union({type(value)}, *map(kinds, value.values()))
        if isinstance(value, list | tuple):
            return set().union({type(value)}, *map(kinds, value))
        return {type(value)}

    plain = {dict, list, tuple, bool, int, float, str, torch.Tensor, type(None), OrderedDict}
    assert kinds(opt.state_dict()) <= plain
    assert opt.state_dict()["param_groups"][0]["k"] == 3


def test_nothing_of_a_dropped_optimizer_stays() -> None:
    """Without the cyclic collector, as of torch's own."""
    collector.disable()
    try:
        for make in (optim.AdamW, torch.optim.AdamW):
            params = leaves()
            opt = train(make(params.values(), lr=0.1), params, range(2))
            old = weakref.ref(next(iter(opt.state.values()))["exp_avg"])
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            train(opt, params, range(2, 3))
            assert old() is None
            new = weakref.ref(next(iter(opt.state.values()))["exp_avg"])
            del opt, params
            assert new() is None
    finally:
        collector.enable()


def test_lookahead_loads_what_its_inner_class_completes() -> None:
    """AdamW knows its decay to be decoupled, whatever was saved."""
    results = []
    for forget in (True, False):
        params = leaves()
        opt = optim.Lookahead(optim.AdamW(params.values(), lr=0.1, weight_decay=0.5, gc="gc"), k=3)
        train(opt, params, range(2))
        state = saved(opt)
        if forget:
            for group in state["param_groups"]:
                del group["decoupled_weight_decay"]
        opt.load_state_dict(state)
        train(opt, params, range(2, 5))
        assert opt._inner.state is opt.state
        results.append(values(opt))
    assert difference(*results) == 0
