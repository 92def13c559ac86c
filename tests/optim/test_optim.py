"""The drop-ins of gcfunc.optim: the reference's results by its own names, torch's without GC."""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

import gcfunc
from gcfunc import GC, optim
from gcfunc._plan import Plan
from tests import golden
from tests.cases import Params, largest_difference, random_like
from tests.optim.training import (
    EXACT,
    PLAIN,
    New,
    Options,
    copies,
    difference,
    leaves,
    require_same_state,
    saved,
    set_grads,
    train,
    values,
)

NAMES = [
    *("SGD", "SGDW", "Adam", "AdamW", "Adagrad", "RAdam", "Ranger", "Lookahead"),
    *("SGD_GC", "SGD_GCC", "SGDW_GC", "SGDW_GCC"),
    *("Adam_GC", "Adam_GCC", "Adam_GC2", "Adam_GCC2"),
    *("AdamW_GC", "AdamW_GCC", "AdamW_GC2", "AdamW_GCC2"),
    *("Adagrad_GC", "Adagrad_GCC"),
]


def test_names() -> None:
    classes = [getattr(optim, name) for name in NAMES]
    assert all(issubclass(cls, Optimizer) for cls in classes)
    assert [cls.__name__ for cls in classes] == NAMES
    assert gcfunc.optim is optim
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "RAdam"):
        assert issubclass(getattr(optim, name), getattr(torch.optim, name))


def rebuilt(case: dict[str, Any], params: Params, **options: Any) -> tuple[Optimizer, bool]:
    """The drop-in for a golden case, and whether decay is to be set for each step."""
    h = dict(case["hyperparameters"])
    name = case["optimizer"]
    if case["source"] == "algorithm-GC":
        del h["use_gc"]
        where = "gcc" if h.pop("gc_conv_only", False) else "gc"
        options = {"gc": GC(where, "gradient" if h.pop("gc_loc", True) else "update")} | options
    elif name == "AdamW":
        # The name is torch's here, whose conventions it has; the reference's are in AdamW_GC.
        name, options = "AdamW_GC", {"gc": None} | options
    if name == "RAdam":
        h["decoupled_weight_decay"] = True
    by_step = case["source"] == "algorithm-GC" and name == "AdamW"
    return getattr(optim, name)(params.values(), **h, **options), by_step


def trajectory(case: dict[str, Any], **options: Any) -> Iterator[tuple[int, Params]]:
    params = copies(golden.tensors("init"))
    opt, by_step = rebuilt(case, params, **options)
    (group,) = opt.param_groups
    decay = group["weight_decay"]
    for t in range(1, golden.MANIFEST["steps"] + 1):
        if by_step:
            group["weight_decay"] = decay / (1 - group["betas"][0] ** t)
        grads = golden.tensors(f"grad/{t}")
        for name, p in params.items():
            p.grad = grads[name]
        opt.step()
        if t in golden.MANIFEST["saved"]:
            yield t, {name: p.detach().clone() for name, p in params.items()}


GOLDEN = [case for case in golden.CASES if not golden.is_quirk(case)]


@pytest.mark.parametrize("case", GOLDEN, ids=golden.ids)
def test_equals_the_reference(case: dict[str, Any]) -> None:
    single = case["optimizer"] in ("RAdam", "Ranger")
    tolerance = golden.SINGLE if single else EXACT
    assert golden.error(case, trajectory(case, compile=False)) < tolerance
    if case["optimizer"] not in ("SGDW", "AdamW") or case["source"] == "algorithm-GC":
        assert golden.error(case, trajectory(case, compile=False, gc=None)) > 1e-4


def test_every_name_of_the_reference_is_among_them() -> None:
    assert {case["optimizer"] for case in GOLDEN if case["source"] == "GC_code"} == {
        *("SGDW", "AdamW"),
        *NAMES[8:],
    }


COMPILED = ["SGDW_GCC", "AdamW_GC2"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_equals_the_reference_compiled(name: str) -> None:
    *_, case = (case for case in GOLDEN if case["optimizer"] == name)
    assert golden.error(case, trajectory(case, compile=True)) < EXACT
    assert counters["stats"]["unique_graphs"]


Scenario = Callable[[New, Params], Optimizer]


def several_groups(new: New, params: Params) -> Optimizer:
    groups = [
        {"params": [params["conv2d.weight"], params["linear.bias"]], "lr": 0.2},
        {"params": [params["linear.weight"]], "weight_decay": 0.5, "maximize": True},
        {"params": [p for n, p in params.items() if n.startswith(("conv1d", "depth", "gain"))]},
    ]
    return train(new(groups), params, range(4))


def a_group_added(new: New, params: Params) -> Optimizer:
    first, *others = params.values()
    opt = train(new([first]), params, range(3))
    opt.add_param_group({"params": others, "lr": 0.3})
    return train(opt, params, range(3, 6))


def some_without_gradient(new: New, params: Params) -> Optimizer:
    return train(new(params.values()), params, range(4), only=["linear.weight", "linear.bias"])


def first_gradients_later(new: New, params: Params) -> Optimizer:
    """Each parameter has its own count of steps."""
    opt = new(params.values())
    train(opt, params, range(2), only=["linear.weight"])
    train(opt, params, range(2, 4), only=["linear.weight", "conv2d.weight", "gain"])
    return train(opt, params, range(4, 7))


def gradients_come_and_go(new: New, params: Params) -> Optimizer:
    opt, names = new(params.values()), [*params]
    for seed in range(6):
        train(opt, params, [seed], only=names[seed % 3 :: 2])
    return train(opt, params, range(6, 8))


def counters_reset(new: New, params: Params) -> Optimizer:
    """In place: of one parameter, then of all."""
    opt = train(new([{"params": [*params.values()]}]), params, range(3))
    first = next(iter(params.values()))
    for some in ([first], [*params.values()]):
        for p in some:
            for value in opt.state[p].values():
                if isinstance(value, Tensor):
                    value.zero_()
        train(opt, params, range(3, 6))
    return opt


def no_gradient_at_all(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2), only=[])
    return train(opt, params, range(2))


def frozen(new: New, params: Params) -> Optimizer:
    weight = params["linear.weight"]
    opt = new(params.values())
    for seed in range(4):
        weight.requires_grad_(seed >= 2)
        opt.zero_grad()
        grads = random_like(params, seed)
        torch.stack([(p * grads[n]).sum() for n, p in params.items()]).sum().backward()
        assert (weight.grad is None) == (seed < 2)
        opt.step()
    return opt


def zeros_for_gradients(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    opt.zero_grad(set_to_none=False)
    opt.step()
    opt.zero_grad()
    opt.step()
    return train(opt, params, range(2))


def closures(new: New, params: Params) -> Optimizer:
    opt: Any = new(params.values())
    calls: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = torch.stack([(p**2).sum() for p in params.values()]).sum()
        loss.backward()
        calls.append(loss)
        return loss

    for i in range(3):
        assert opt.step(closure) is calls[-1]
        assert len(calls) == i + 1
    return opt


def other_options(new: New, params: Params) -> Optimizer:
    """Each changed in the middle of training; a number, a tensor, the same number again."""
    opt = new(params.values())
    (group,) = opt.param_groups
    changes: Options = {"weight_decay": 0.3, "eps": 0.2, "betas": (0.3, 0.6), "lr_decay": 0.2}
    changes |= {"dampening": 0.0, "momentum": 0.5, "maximize": not group["maximize"]}
    train(opt, params, range(2))
    for option in changes.keys() & group.keys():
        if option != "momentum" or group["momentum"]:
            group[option] = changes[option]
    train(opt, params, range(2, 4))
    for lr in (0.2, torch.tensor(0.05, dtype=torch.float64), 0.2):
        group["lr"] = lr
        train(opt, params, range(4, 6))
    return opt


def a_tensor_lr(new: New, params: Params) -> Optimizer:
    opt = new(params.values(), lr=torch.tensor(0.2, dtype=torch.float64))
    train(opt, params, range(2))
    opt.param_groups[0]["lr"].fill_(0.05)
    return train(opt, params, range(2, 4))


def a_tensor_lr_of_one_element(new: New, params: Params) -> Optimizer:
    return train(new(params.values(), lr=torch.tensor([0.2]).double()), params, range(3))


def names(new: New, params: Params) -> Optimizer:
    return train(new(params.items()), params, range(3))


def clipped(new: New, params: Params) -> Optimizer:
    opt = new(params.values())
    for seed in range(3):
        set_grads(params, seed)
        nn.utils.clip_grad_norm_(params.values(), 0.5, foreach=True)
        opt.step()
    return opt


def strided(new: New, params: Params) -> Optimizer:
    filters, matrix = params["conv2d.weight"], params["linear.weight"]
    filters.data = filters.data.to(memory_format=torch.channels_last)
    matrix.data = matrix.data.t().contiguous().t()
    return train(new(params.values()), params, range(3))


def moved(new: New, params: Params) -> Optimizer:
    """``p.data = ...`` keeps the object."""
    opt = train(new(params.values()), params, range(2))
    for p in params.values():
        p.data = p.data.clone() * 0.5
    return train(opt, params, range(2, 4))


def state_replaced(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    for entry in opt.state.values():
        entry.update({slot: t * 0.5 for slot, t in entry.items() if slot != "step"})
    train(opt, params, range(2, 4))
    for entry in opt.state.values():
        if "step" in entry:
            entry["step"] = torch.tensor(7.0)
    return train(opt, params, range(4, 6))


def state_cleared(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    opt.state.clear()
    train(opt, params, range(2, 4))
    opt.state.pop(params["conv2d.weight"], None)
    return train(opt, params, range(4, 6))


def groups_replaced(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    (group,) = opt.param_groups
    opt.param_groups = [dict(group, params=[p]) for p in group["params"]][1:]
    train(opt, params, range(2, 4))
    opt.param_groups = [dict(group, lr=0.3) for group in opt.param_groups]
    train(opt, params, range(2, 4))
    opt.param_groups.clear()
    opt.add_param_group({"params": [*params.values()], "lr": 0.3})
    return train(opt, params, range(4, 6))


def without_momentum_for_a_while(new: New, params: Params) -> Optimizer:
    """Also in a group of its own, which torch asks nothing about Nesterov."""
    one, *others = params.values()
    opt = new([{"params": [one], "momentum": 0}, {"params": others}])
    if "momentum" not in opt.defaults:
        return train(opt, params, range(2))
    train(opt, params, range(2))
    for momentum in (0, 0.9):
        for group in opt.param_groups:
            group["momentum"] = momentum
        train(opt, params, range(2, 4))
    return opt


def loaded_in_the_middle(new: New, params: Params) -> Optimizer:
    opt = train(new(params.values()), params, range(2))
    earlier = saved(opt)
    train(opt, params, range(2, 5))
    opt.load_state_dict(earlier)
    return train(opt, params, range(2, 5))


SCENARIOS: list[Scenario] = [
    several_groups,
    a_group_added,
    some_without_gradient,
    first_gradients_later,
    gradients_come_and_go,
    counters_reset,
    no_gradient_at_all,
    frozen,
    zeros_for_gradients,
    closures,
    other_options,
    a_tensor_lr,
    a_tensor_lr_of_one_element,
    names,
    clipped,
    strided,
    moved,
    state_replaced,
    state_cleared,
    groups_replaced,
    without_momentum_for_a_while,
    loaded_in_the_middle,
]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_without_gc_it_is_torch(scenario: Scenario, kind: str) -> None:
    name, options = PLAIN[kind]
    params, same, start = leaves(), leaves(), leaves()
    ours = scenario(partial(getattr(optim, name), **options), params)
    theirs = scenario(partial(getattr(torch.optim, name), **options), same)
    assert difference([*params.values()], [*same.values()]) <= EXACT
    require_same_state(ours.state_dict(), theirs.state_dict())
    assert difference([*params.values()], [*start.values()]) > 1e-3


# Functional twins, to compare with where there is no class of torch's: with GC.
TWINS: dict[str, tuple[str, Options]] = {
    **{kind: PLAIN[kind] for kind in ("SGD, momentum", "Adam, amsgrad", "AdamW", "RAdam")},
    "SGDW": ("SGDW", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "Adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    "Ranger": ("Ranger", {"lr": 0.1, "weight_decay": 0.1, "k": 3, "alpha": 0.7}),
}
WITH: dict[str, Any] = {
    "gc": "gc",
    "gcc": "gcc",
    "at the update": GC("gc", at="update"),
    "a predicate": GC(lambda name, p: name == "linear.weight"),
    "a mask": GC({name: "linear" in name for name in leaves()}),
    "units": GC(lambda name, p: name == "linear.weight" and gcfunc.Units(dim=1)),
}


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("gc", WITH.values(), ids=WITH.keys())
def test_equals_the_functional_step(gc: Any, kind: str) -> None:
    name, options = TWINS[kind]
    start = leaves()
    results = []
    for choice in (gc, None):
        own = copies(start)
        train(getattr(optim, name)(own.items(), **options, gc=choice), own, range(6))
        results.append(own)
    functional = {k: v for k, v in options.items() if k != "maximize"}
    opt = getattr(gcfunc, name.lower())(**functional, gc=gc)
    params = {n: p.detach() for n, p in start.items()}
    state = opt.init(params)
    for seed in range(6):
        grads = random_like(params, seed)
        if options.get("maximize"):
            grads = {n: -g for n, g in grads.items()}
        params, state = opt.step(params, grads, state)
    with torch.no_grad():
        assert largest_difference(params, results[0]) <= EXACT
        assert largest_difference(params, results[1]) > 1e-4


class Net(nn.Module):
    """Of what select tells apart: an embedding, a transposed convolution, a norm, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.up = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(self.embedding(x).transpose(1, 2))
        return self.out(torch.tanh(self.norm(up)).transpose(1, 2))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def run(model: Net, opt: Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        x = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(seed))
        opt.zero_grad()
        (model(x) ** 2).sum().backward()
        opt.step()


def test_named_parameters_and_a_mask_from_the_modules() -> None:
    """One mask for all groups, each of which has a part of the names."""
    model, other = net(), net()
    mask = gcfunc.select(model)
    assert mask["up.weight"] == gcfunc.Units(1, 2)
    named = [*model.named_parameters()]
    groups: list[Options] = [{"params": named[:3]}, {"params": named[3:], "lr": 0.02}]
    run(model, optim.SGD(groups, lr=0.01, momentum=0.9, gc=GC(mask)))

    params = [*other.parameters()]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
    plain = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    with gcfunc.hooks.centralize_backward(other, where=mask):
        run(other, plain)
    third = net()
    run(third, optim.SGD(third.named_parameters(), lr=0.01, momentum=0.9))
    results = [[*each.parameters()] for each in (model, other, third)]
    assert difference(*results[:2]) <= EXACT
    assert difference(*results[1:]) > 1e-4


def test_groups_choose_their_gc() -> None:
    """The default, another one, none; biases alone are no mistake."""
    params, same = leaves(), leaves()
    late = GC("gc", at="update")
    choices: dict[str, Any] = {"linear.weight": None, "depthwise.weight": late}
    opt = optim.SGD(
        [
            {"params": [params["conv2d.weight"], params["conv1d.weight"]]},
            {"params": [params["linear.weight"]], "gc": None},
            {"params": [params["linear.bias"]]},
            {"params": [params["depthwise.weight"]], "gc": late},
            {"params": [params["gain"]], "gc": "gcc"},
        ],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        gc="gc",
    )
    assert [group["gc"] for group in opt.param_groups] == ["gc", None, "gc", late, "gcc"]
    train(opt, params, range(3))
    for name, p in same.items():
        gc = choices.get(name, "gc") if p.ndim >= 2 else None
        functional = gcfunc.sgd(0.1, 0.9, weight_decay=0.1, gc=gc)
        state = functional.init(p)
        new = p.detach()
        for seed in range(3):
            new, state = functional.step(new, random_like(same, seed)[name], state)
        assert difference([params[name]], [new]) <= EXACT, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_gc_changes_in_mid_training(compiled: bool) -> None:
    sizes = (4, 3)
    weight = torch.zeros(sizes, dtype=torch.float64, requires_grad=True)
    step = torch.arange(12.0, dtype=torch.float64).view(sizes).cos()
    # Decoupled, so that it matters where in the step.
    opt = optim.SGDW([("weight", weight)], lr=1.0, weight_decay=1.0, gc="gc", compile=compiled)
    for gc, at in (
        ("gc", "gradient"),
        (GC("gc", at="update"), "update"),
        (GC("gc"), "gradient"),
        (None, None),
        (GC({"weight": True}), "gradient"),
        (GC({"weight": False}), None),
        (GC({"weight": gcfunc.Units(dim=1)}), "columns"),
    ):
        opt.param_groups[0]["gc"] = gc
        weight.data = torch.ones(sizes).double().cumsum(1)
        weight.grad = step.clone()
        u = step + weight.detach()
        if at:
            taken = u if at == "update" else step
            u = u - taken.mean(0 if at == "columns" else 1, keepdim=True)
        want = weight.detach() - u
        opt.step()
        assert difference([weight], [want]) <= EXACT, gc


def test_gc_is_set_and_read_like_an_option() -> None:
    params = leaves()
    opt = optim.SGD(params.values(), lr=0.1, gc="gc")
    (group,) = opt.param_groups
    assert group["gc"] == "gc"
    group.update(gc="gcc")
    assert group["gc"] == "gcc"
    group["gc"] = None
    assert group["gc"] is None
    train(opt, params, range(2))
    same = leaves()
    train(torch.optim.SGD(same.values(), lr=0.1), same, range(2))
    assert difference([*params.values()], [*same.values()]) <= EXACT


def test_other_parameters_in_a_group() -> None:
    """Some trainers exchange the tensors of a group's list."""
    params = [torch.ones(4, 3).double(), torch.ones(4).double()]
    opt = optim.SGD([p.clone().requires_grad_() for p in params], lr=1.0, gc="gc")
    for group in (params, params[::-1]):
        own = [p.clone().requires_grad_() for p in group]
        opt.param_groups[0]["params"] = own
        for p in own:
            p.grad = torch.ones_like(p)
        opt.step()
        for p in own:
            assert torch.equal(p.detach(), torch.full_like(p, p.ndim - 1.0))


def test_two_models_of_the_same_names() -> None:
    results = []
    for names in (True, False):
        params, second = leaves(), leaves()
        both = {**params, **{f"2.{name}": p for name, p in second.items()}}
        given = [*params.items(), *second.items()] if names else both.values()
        results.append(train(optim.SGD(given, lr=0.1, momentum=0.9, gc="gc"), both, range(3)))
    assert difference(*map(values, results)) == 0


@pytest.mark.parametrize("kind", TWINS)
def test_gradients_are_never_written(kind: str) -> None:
    name, options = TWINS[kind]
    params = leaves()
    options = options | {"weight_decay": 0.1, "maximize": True}
    opt = getattr(optim, name)(params.values(), **options, gc="gc")
    for seed in range(3):
        set_grads(params, seed)
        given = {name: p.grad for name, p in params.items()}
        versions = [g._version for g in given.values() if g is not None]
        opt.step()
        assert all(p.grad is given[name] for name, p in params.items())
        assert versions == [g._version for g in given.values() if g is not None]
        want = random_like(params, seed)
        assert all(torch.equal(g, want[name]) for name, g in given.items() if g is not None)


class Calls:
    """Stands in for gcfunc.compile: counts, over all copies, and does not compile."""

    def __init__(self, error: Exception | None = None) -> None:
        self.made: list[gcfunc.Optimizer] = []
        self.called: list[int] = []
        self._error = error

    def __call__(self, opt: gcfunc.Optimizer) -> "Calls":
        self.made.append(opt)
        self._eager = optim._eager(opt)
        return self

    def step_flat(self, flat: Any, grads: Any, state: Any) -> None:
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
    assert optim.COMPILE_FROM == 1_000_000
    calls = Calls()
    monkeypatch.setattr(optim, "compile", calls)
    monkeypatch.setattr(optim, "COMPILE_FROM", least)
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
    monkeypatch.setattr(optim, "compile", calls)
    monkeypatch.setattr(optim, "COMPILE_FROM", 1)
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
    def unsupported(opt: gcfunc.Optimizer) -> None:
        raise RuntimeError("torch.compile is not supported on Python 4")

    monkeypatch.setattr(optim, "compile", unsupported)
    monkeypatch.setattr(optim, "COMPILE_FROM", 1)
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
    monkeypatch.setattr(optim, "COMPILE_FROM", 1)
    nowhere = {"cpp.cxx": ("/nowhere/c++",), "fx_graph_cache": False}
    with torch._inductor.config.patch(nowhere):
        params = {"weight": torch.zeros(4, 3, dtype=dtype).requires_grad_()}
        with pytest.warns(UserWarning, match="not compiled.*compiler"):
            train(optim.SGD(params.values(), lr=0.1, gc="gc"), params, range(1))
        with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="compiler"):
            train(optim.SGD(params.values(), lr=0.1, compile=True), params, range(1))


def test_compile_true_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = Failure(lambda: None, RuntimeError("no compiler"), None)
    monkeypatch.setattr(optim, "compile", Calls(failure))
    params = leaves()
    opt = optim.SGD(params.values(), lr=0.1, momentum=0.9, compile=True)
    before = values(opt)
    with pytest.raises(Failure, match="no compiler"):
        train(opt, params, range(1))
    assert difference(values(opt), before) == 0


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RAdam", "AdamW_GC2"])
def test_signature_is_that_of_torch_and_two_arguments_more(name: str) -> None:
    ours = inspect.signature(getattr(optim, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name.partition("_")[0])).parameters
    assert {*ours} - {"gc", "compile", "kwargs"} <= {*theirs}
    assert [*ours][:3] == [*theirs][:3]
    assert ours["gc"].default == (GC("gc", at="update") if "_" in name else None)
    assert ours["compile"].default is None


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
    monkeypatch.setattr(optim, "compile", calls)
    monkeypatch.setattr(optim, "COMPILE_FROM", 1)
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

    monkeypatch.setattr(sys.modules["gcfunc.compile"], "Plan", Counted)
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


INNER: dict[str, tuple[str, Options]] = TWINS | {"SGD": PLAIN["SGD"]}
del INNER["Ranger"]


@pytest.mark.parametrize("kind", INNER)
def test_lookahead_equals_the_functional_one(kind: str) -> None:
    name, options = INNER[kind]
    options = {option: value for option, value in options.items() if option != "maximize"}
    params = leaves()
    inner = getattr(optim, name)(params.values(), **options, gc="gc")
    opt = train(optim.Lookahead(inner, k=3, alpha=0.7), params, range(7))
    functional = gcfunc.lookahead(getattr(gcfunc, name.lower())(**options, gc="gc"), k=3, alpha=0.7)
    want = {n: p.detach() for n, p in leaves().items()}
    state = functional.init(want)
    for seed in range(7):
        want, state = functional.step(want, random_like(want, seed), state)
    assert difference(values(opt), [*want.values()]) <= EXACT
    slow = [entry["slow_params"] for entry in opt.state.values()]
    assert difference(slow, [*state.slots["slow_params"].values()]) <= EXACT
    assert difference(slow, values(opt)) > 1e-3


def test_lookahead_goes_on_where_its_inner_optimizer_was() -> None:
    params = leaves()
    inner = optim.Adam(params.values(), lr=0.1, gc="gc")
    train(inner, params, range(2))
    opt = train(optim.Lookahead(inner, k=3, alpha=0.7), params, range(2, 7))
    functional = gcfunc.adam(0.1, gc="gc")
    want = {n: p.detach() for n, p in leaves().items()}
    state = functional.init(want)
    for seed in range(7):
        if seed == 2:
            functional = gcfunc.lookahead(functional, k=3, alpha=0.7)
            start = functional.init(want)
            slots = {**start.slots, **state.slots}
            state = start._replace(step=state.step, slots=slots)
        want, state = functional.step(want, random_like(want, seed), state)
    assert difference(values(opt), [*want.values()]) <= EXACT


def test_ranger_is_lookahead_over_radam() -> None:
    """With Ranger's defaults."""
    params, same = leaves(), leaves()
    train(optim.Ranger(params.values(), gc="gc"), params, range(13))
    inner = optim.RAdam(
        same.values(), 1e-3, (0.95, 0.999), 1e-5, decoupled_weight_decay=True, gc="gc"
    )
    train(optim.Lookahead(inner, k=6, alpha=0.5), same, range(13))
    assert difference([*params.values()], [*same.values()]) <= EXACT
