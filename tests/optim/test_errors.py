"""Bad input to the drop-ins: torch's errors where torch has one; and nothing changed."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from gcfunc import GC, optim
from gcfunc._catalog import CATALOG
from tests.optim.training import (
    difference,
    leaves,
    require_same_state,
    saved,
    set_grads,
    train,
    values,
)

CLASSES = [row.drop_in.__name__ for row in CATALOG.values() if row.twin]
ADAMS = ["Adam", "AdamW", "RAdam"]
Call = Callable[[Any], object]


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (4, 3), dtype=dtype, requires_grad=True)


def given(**options: Any) -> Call:
    return lambda cls: cls([weight()], **options)


def add(group: Any) -> Call:
    return lambda cls: cls([weight()]).add_param_group(group)


def of(params: Callable[[], Any]) -> Call:
    return lambda cls: cls(params())


def twice(cls: Any) -> object:
    p = weight()
    return cls([{"params": [p]}, {"params": [p]}])


def twice_in_a_group(cls: Any) -> object:
    p = weight()
    return cls([p, p])


def non_leaf() -> list[Tensor]:
    return [weight() * 2]


def loads(change: Callable[[dict[str, Any]], object]) -> Call:
    def call(cls: Any) -> None:
        opt = cls([weight(), weight()])
        state = opt.state_dict()
        change(state)
        opt.load_state_dict(state)

    return call


# What is called, and of which classes, torch's or ours.
LIKE_TORCH: dict[str, tuple[Call, list[str]]] = {
    "negative lr": (given(lr=-0.1), CLASSES),
    "negative tensor lr": (given(lr=torch.tensor(-0.1)), CLASSES),
    "lr of two elements": (given(lr=torch.ones(2)), CLASSES),
    "negative decay": (given(weight_decay=-0.1), CLASSES),
    "negative momentum": (given(momentum=-0.1), ["SGD"]),
    "nesterov without momentum": (given(nesterov=True), ["SGD"]),
    "nesterov with dampening": (given(nesterov=True, momentum=0.9, dampening=0.1), ["SGD"]),
    "negative eps": (given(eps=-1e-8), [*ADAMS, "Adagrad"]),
    "beta1 of 1": (given(betas=(1.0, 0.9)), ADAMS),
    "negative beta2": (given(betas=(0.9, -0.1)), ADAMS),
    "betas of two kinds": (given(betas=(0.9, torch.tensor(0.9))), ["Adam", "AdamW"]),
    "negative lr_decay": (given(lr_decay=-0.1), ["Adagrad"]),
    "negative start": (given(initial_accumulator_value=-0.1), ["Adagrad"]),
    "fused and foreach": (given(fused=True, foreach=True), ["SGD", "Adam", "AdamW", "Adagrad"]),
    "unknown option": (given(nonsense=1), CLASSES),
    "no parameters": (of(list), CLASSES),
    "a tensor": (of(weight), CLASSES),
    "no tensors": (of(lambda: ["weight"]), CLASSES),
    "some names": (of(lambda: [("weight", weight()), weight()]), CLASSES),
    "a non-leaf": (of(non_leaf), CLASSES),
    "in two groups": (twice, CLASSES),
    "twice in a group": (twice_in_a_group, CLASSES),
    "a group that is no dict": (add([weight()]), CLASSES),
    "a group of a set": (lambda cls: add({"params": {weight()}})(cls), CLASSES),
    "a non-leaf group": (lambda cls: add({"params": non_leaf()})(cls), CLASSES),
    "a group with names": (lambda cls: add({"params": [("weight", weight())]})(cls), CLASSES),
    "a loaded group too many": (loads(lambda s: s["param_groups"].append({})), CLASSES),
    "loaded groups too short": (loads(lambda s: s["param_groups"][0]["params"].pop()), CLASSES),
    "nothing loaded": (loads(dict.clear), CLASSES),
}


def error(call: Call, cls: Any) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as info:  # noqa: PT011
        call(cls)
    return type(info.value), str(info.value)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        pytest.param(call, name, id=f"{bad}-{name}")
        for bad, (call, names) in LIKE_TORCH.items()
        for name in names
    ],
)
def test_errors_are_those_of_torch(call: Call, name: str) -> None:
    assert error(call, getattr(optim, name)) == error(call, getattr(torch.optim, name))


def ignoring_warnings(call: Call) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(optim.SGD)


def named(module: nn.Module | None = None) -> Any:
    return (module or nn.Linear(3, 2)).named_parameters()


# What torch does not know, or can do and these cannot.
OWN: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "capturable": (
        lambda: optim.Adam([weight()], capturable=True),
        ValueError,
        "Adam does not support capturable=True",
    ),
    "differentiable": (
        lambda: optim.SGD([weight()], differentiable=True),
        ValueError,
        "SGD does not support differentiable=True",
    ),
    "complex": (
        lambda: optim.SGD([weight(dtype=torch.complex64)]),
        TypeError,
        "params: '0' has dtype torch.complex64; supported are",
    ),
    "unknown gc": (lambda: optim.SGD([weight()], gc="GC"), ValueError, "gc must be None, 'gc'"),
    "gc of another kind": (
        lambda: optim.SGD([weight()], gc=cast(Any, True)),
        TypeError,
        "gc must be None",
    ),
    "unknown gc of a group": (
        lambda: optim.SGD([{"params": [weight()], "gc": "GC"}]),
        ValueError,
        "gc must be None, 'gc'",
    ),
    "nothing for gc": (
        lambda: optim.SGD(named(), gc="gcc"),
        ValueError,
        "gc='gcc' selects none of the parameters (weight (2, 3), bias (2,)); gc=None says so",
    ),
    "nothing for a group's gc": (
        lambda: optim.SGD([{"params": [weight(), weight()], "gc": "gcc"}, {"params": [weight()]}]),
        ValueError,
        "gc='gcc' selects none of the parameters (0 (4, 3), 1 (4, 3)); gc=None says so",
    ),
    "nothing for a name": (
        lambda: optim.SGD_GCC(named()),
        ValueError,
        "gc='gcc' selects none of the parameters",
    ),
    "nothing for a predicate": (
        lambda: optim.SGD(named(), gc=GC(lambda name, p: "weigth" in name)),
        ValueError,
        "gc=GC(<function>) selects none of the parameters (weight (2, 3), bias (2,)); gc=None says",
    ),
    "nothing for a mask": (
        lambda: optim.SGD(named(), gc=GC({"weight": False, "bias": False})),
        ValueError,
        "gc=GC(<dict>) selects none of the parameters (weight (2, 3), bias (2,)); gc=None says so",
    ),
    "mask without names": (
        lambda: optim.SGD([weight()], gc=GC({"weight": True})),
        ValueError,
        "a mask needs names; give the optimizer model.named_parameters()",
    ),
    "mask without a name": (
        lambda: optim.SGD(named(), gc=GC({"weight": True})),
        ValueError,
        "the mask has no 'bias'",
    ),
    "a predicate of two models": (
        lambda: optim.SGD([*named(), *named()], gc=GC(lambda name, p: p.ndim >= 2)),
        ValueError,
        "gc: two parameters have the name 'bias', 'weight'",
    ),
    "twice in a group, of which torch warns": (
        lambda: ignoring_warnings(twice_in_a_group),
        ValueError,
        "some parameters appear more than once in a parameter group",
    ),
    "mask of strings": (
        lambda: optim.SGD(named(), gc=GC({"weight": "yes", "bias": "no"})),
        TypeError,
        "where: 'weight' must map to a bool or Units",
    ),
    "no k": (lambda: optim.Ranger([weight()], k=0), ValueError, "k must be an integer from 1"),
    "too much alpha": (
        lambda: optim.Lookahead(optim.SGD([weight()]), alpha=1.5),
        ValueError,
        "alpha must be in [0, 1]",
    ),
    "lookahead around torch's": (
        lambda: optim.Lookahead(torch.optim.SGD([weight()])),  # type: ignore[arg-type]
        TypeError,
        "optimizer must be one of gcfunc.optim, and not a lookahead already, got SGD",
    ),
    "lookahead around a lookahead": (
        lambda: optim.Lookahead(optim.Ranger([weight()])),
        TypeError,
        "optimizer must be one of gcfunc.optim, and not a lookahead already, got Ranger",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), OWN.values(), ids=OWN.keys())
def test_errors_of_its_own(call: Callable[[], object], kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()


def make(name: str, params: Any, **options: Any) -> Optimizer:
    if name == "Lookahead":
        return optim.Lookahead(optim.AdamW(params, **options))
    return getattr(optim, name)(params, **options)


GROUPS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "parameters twice": lambda params: {"params": [params["linear.bias"]]},
    "a non-leaf": lambda params: {"params": non_leaf()},
    "without names": lambda params: {"params": [weight()]},
    "complex": lambda params: {"params": [("z", weight(dtype=torch.complex64))]},
    "unknown gc": lambda params: {"params": [("w", weight())], "gc": "GC"},
    "mask without the name": lambda params: {"params": [("w", weight())], "gc": GC({"v": True})},
}


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Lookahead"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
def test_a_group_that_is_refused_is_not_added(group: Any, name: str) -> None:
    results = []
    for bad in (True, False):
        params = leaves()
        opt = train(make(name, [*params.items()], lr=0.1, gc="gc"), params, range(2))
        if bad:
            with pytest.raises((ValueError, TypeError)):
                opt.add_param_group(group(params))
            assert len(opt.param_groups) == 1
        train(opt, params, range(2, 4))
        results.append(opt)
    assert difference(*map(values, results)) == 0
    require_same_state(results[0].state_dict(), results[1].state_dict(), within=0)


def sparse(p: Tensor) -> Tensor:
    return torch.ones_like(p).to_sparse()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", [*CLASSES, "SGDW", "Ranger", "Lookahead"])
def test_a_step_that_fails_changes_nothing(name: str, steps: int) -> None:
    """The second group has a sparse gradient; afterwards, training goes on."""
    results = []
    for bad in (True, False):
        params = leaves()
        groups = [{"params": [p]} for p in params.values()]
        opt = train(make(name, groups, lr=0.1, gc="gc"), params, range(steps))
        if bad:
            before, state = values(opt), saved(opt)
            set_grads(params, steps)
            last = params["linear.weight"]
            last.grad = sparse(last)
            with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
                opt.step()
            assert difference(values(opt), before) == 0
            require_same_state(opt.state_dict(), state, within=0)
        train(opt, params, range(steps, steps + 2))
        results.append(opt)
    assert difference(*map(values, results)) == 0
    require_same_state(results[0].state_dict(), results[1].state_dict(), within=0)


def test_a_step_that_fails_changes_nothing_of_one_group() -> None:
    """Its parameters have taken several numbers of steps, and go one number after the other."""
    params = leaves()
    last = params["linear.weight"]
    opt = optim.Adam(params.values(), lr=0.1, gc="gc")
    train(opt, {name: p for name, p in params.items() if p is not last}, range(1))
    train(opt, params, range(1, 3))
    before = values(opt)
    set_grads(params, 3)
    last.grad = sparse(last)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        opt.step()
    assert difference(values(opt), before) == 0


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_group_with_unknown_gc_lets_none_step(name: str) -> None:
    params = leaves()
    groups = [{"params": [p]} for p in params.values()]
    opt = getattr(optim, name)(groups, lr=0.1)
    before, state = values(opt), saved(opt)
    opt.param_groups[1]["gc"] = "GC"
    with pytest.raises(ValueError, match="gc must be None"):
        train(opt, params, range(1))
    assert difference(values(opt), before) == 0
    require_same_state(opt.state_dict(), state, within=0)
    opt.param_groups[1]["gc"] = None
    same = leaves()
    train(opt, params, range(2))
    train(getattr(torch.optim, name)(same.values(), lr=0.1), same, range(2))
    assert difference([*params.values()], [*same.values()]) <= 1e-12


@pytest.mark.parametrize("compiled", [False, True])
def test_a_closure_that_fails_changes_nothing(compiled: bool) -> None:
    params = leaves()
    opt = optim.SGD(params.values(), lr=0.1, momentum=0.9, compile=compiled)
    set_grads(params, 0)
    before = values(opt)

    def closure() -> float:
        raise ArithmeticError("the loss is not finite")

    with pytest.raises(ArithmeticError, match="not finite"):
        opt.step(closure)
    assert difference(values(opt), before) == 0
    assert not opt.state


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("originals", [False, True])
def test_flattened_parameters_are_refused(originals: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP is switching", UserWarning)
        model = FullyShardedDataParallel(
            nn.Linear(3, 2), device_id=torch.device("cpu"), use_orig_params=originals
        )
    with pytest.raises(ValueError, match=r"flattened by FullyShardedDataParallel \(FSDP1\)"):
        optim.SGD(model.parameters(), lr=0.1, gc="gc")
    before = copy.deepcopy([*model.parameters()])
    opt = optim.SGD(model.parameters(), lr=0.1)  # elementwise, so flat ones will do
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    moved = difference([p.detach() for p in model.parameters()], before)
    assert moved == pytest.approx(0.1)


def test_meta_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="'weight' is on the meta device and has no values"):
        optim.SGD(nn.Linear(3, 2, device="meta").named_parameters(), lr=0.1)


def test_biases_alone_in_a_group_are_no_error() -> None:
    params = leaves()
    groups = [{"params": [params["linear.weight"]]}, {"params": [params["linear.bias"]]}]
    opt = train(optim.SGD(groups, lr=0.1, gc="gc"), params, range(1))
    opt.add_param_group({"params": [params["gain"]]})
    train(opt, params, range(1, 2))
