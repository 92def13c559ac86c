"""A loop that forgets to detach is told once; who differentiates through steps is not."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import gcfunc
from gcfunc import Optimizer, State
from tests.cases import ALGORITHMS, Params, largest_difference, make_params, random_like

FEW, MANY = 20, 100
SAID = "recorded {} optimizer steps in a row"
Loop = Callable[[Optimizer, Params, int], None]


@contextmanager
def telling(steps: int) -> Iterator[None]:
    """One warning of ours and no other, after so many steps, in this file."""
    with pytest.warns(UserWarning, match=SAID.format(steps + 1)) as told:
        yield
    # Dynamo warns of Python 3.13.0.
    (one,) = (warning for warning in told if warning.category is UserWarning)
    assert Path(one.filename) == Path(__file__)
    line = Path(__file__).read_text("utf-8").splitlines()[one.lineno - 1]
    assert "step(" in line


def trained() -> Params:
    return {name: p.requires_grad_() for name, p in make_params().items()}


def forgets(opt: Any, params: Any, steps: int) -> Any:
    """Gradients without history, params with it."""
    state = opt.init(params)
    for t in range(steps):
        leaves, spec = pytree.tree_flatten(params)
        loss = torch.stack([(p * (p - t)).sum() for p in leaves]).sum()
        grads = pytree.tree_unflatten(torch.autograd.grad(loss, leaves), spec)
        params, state = opt.step(params, grads, state)
    return params


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_loop_that_forgets_is_told_once(name: str, packed: bool) -> None:
    opt = ALGORITHMS[name]("gc")
    labels = (lambda name, t: "decay" if t.ndim >= 2 else "rest") if name == "partition" else None

    def params(requires_grad: bool) -> Any:
        tree: Any = gcfunc.pack(make_params(), labels=labels) if packed else make_params()
        return pytree.tree_map(lambda t: t.requires_grad_(requires_grad), tree)

    def run(opt: Optimizer) -> Params:
        made = forgets(opt, params(True), FEW + 5)
        return gcfunc.unpack(made) if packed else made

    with telling(FEW):
        recorded = run(opt)
    with warnings.catch_warnings(action="ignore"):
        assert largest_difference(recorded, run(ALGORITHMS[name](None))) > 1e-6
    with torch.no_grad():
        detached, state = params(False), opt.init(params(False))
        for t in range(FEW + 5):
            grads = pytree.tree_map(lambda p, t=t: 2 * p - t, detached)
            detached, state = opt.step(detached, grads, state)
    detached = gcfunc.unpack(detached) if packed else detached
    assert largest_difference(recorded, detached) < 1e-9


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_steps_that_stay_pure_are_followed() -> None:
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    with telling(FEW):
        compiled = forgets(
            gcfunc.compile(opt, donate=False, backend="aot_eager"), trained(), FEW + 5
        )
    with warnings.catch_warnings(action="ignore"):
        assert largest_difference(compiled, forgets(opt, trained(), FEW + 5)) < 1e-9
        assert largest_difference(compiled, forgets(gcfunc.sgd(0.1, 0.9), trained(), 25)) > 1e-6
    with warnings.catch_warnings(action="error"), torch.no_grad():
        step = gcfunc.train_step(nn.Linear(3, 2), nn.functional.mse_loss, opt)
        fitted, train = gcfunc.compile(step, donate=False, backend="aot_eager"), step.init()
        for _ in range(FEW + 5):
            train, _ = fitted.step(train, torch.ones(4, 3), torch.ones(4, 2))


def by_func(opt: Optimizer, params: Params, steps: int) -> None:
    """Gradients by torch.func, which have a history because params require grad."""
    state = opt.init(params)
    for _ in range(steps):
        grads = torch.func.grad(lambda ps: sum(p.square().sum() for p in ps.values()))(params)
        params, state = opt.step(params, grads, state)


def whole_steps(opt: Optimizer, params: Params, steps: int) -> None:
    model = nn.Linear(6, 5)
    step = gcfunc.train_step(model, nn.functional.mse_loss, opt)
    train = step.init()._replace(params=dict(model.named_parameters()))
    for _ in range(steps):
        train, _ = step(train, torch.ones(2, 6), torch.ones(2, 5))


def learns_lr(opt: Optimizer, params: Params, steps: int) -> None:
    """The params are detached, but what they are computed with is not."""
    params = {name: p.detach() for name, p in params.items()}
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    state = gcfunc.update_hyperparams(opt.init(params), lr=lr)
    for t in range(steps):
        params, state = opt.step(params, random_like(params, t), state)


def ensemble(opt: Optimizer, params: Params, steps: int) -> None:
    """What torch.func.stack_module_state gives requires grad."""
    params, _ = torch.func.stack_module_state([nn.Linear(6, 5) for _ in range(2)])
    step = torch.func.vmap(opt.step)
    state = torch.func.vmap(opt.init)(params)
    for _ in range(steps):
        grads = torch.func.grad(lambda ps: sum(p.square().sum() for p in ps.values()))(params)
        params, state = step(params, grads, state)


@pytest.mark.parametrize("loop", [by_func, whole_steps, learns_lr, ensemble])
def test_what_looks_like_meta_learning_is_told_later(loop: Loop) -> None:
    with telling(MANY):
        loop(gcfunc.sgd(0.01, momentum=0.9, gc="gc"), trained(), MANY + 5)


def test_a_state_that_keeps_history_is_told() -> None:
    """Decay has the momentum remember params of all steps, though they are detached each time."""
    opt, params = gcfunc.sgd(0.1, 0.9, weight_decay=0.1, gc="gc"), trained()
    state = opt.init(params)
    with telling(FEW):
        for t in range(FEW + 5):
            params, state = opt.step(params, random_like(params, t), state)
            params = {name: p.detach().requires_grad_() for name, p in params.items()}


BETWEEN: dict[str, Callable[[Params], Params]] = {
    "cloned": lambda params: {name: p.clone() for name, p in params.items()},
    "clamped": lambda params: {name: p.clamp_(-9, 9) for name, p in params.items()},
    "masked": lambda params: {name: p * p.ne(0) for name, p in params.items()},
    "of norm 1": lambda params: {name: p / p.norm() for name, p in params.items()},
    "in another dtype": lambda params: {name: p.float().double() for name, p in params.items()},
    "one of them made anew": lambda params: {**params, "gain": torch.ones(()).double()},
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_done_to_params_between_steps(name: str) -> None:
    opt, params = gcfunc.sgd(0.1, gc="gc"), trained()
    state = opt.init(params)
    with telling(FEW):
        for t in range(FEW + 5):
            params, state = opt.step(params, random_like(params, t), state)
            params = BETWEEN[name](params)


@pytest.mark.parametrize("outer", [False, True], ids=["vmap", "vmap of vmap"])
def test_an_ensemble_that_forgets_is_told(outer: bool) -> None:
    opt = gcfunc.adamw(0.1, gc="gc")
    params = {"weight": torch.ones(2, 4, 3, 5, requires_grad=True)}
    init, step = torch.func.vmap(opt.init), torch.func.vmap(opt.step)
    if outer:
        init, step = torch.func.vmap(init), torch.func.vmap(step)
    state = init(params)
    with telling(FEW):
        for t in range(FEW + 5):
            params, state = step(params, random_like(params, t), state)


def test_gradients_that_come_in_turns() -> None:
    opt, params = gcfunc.adamw(0.1, gc="gc"), trained()
    state = opt.init(params)
    with telling(FEW):
        for t in range(FEW + 5):
            grads: dict[str, Tensor | None] = dict(random_like(params, t))
            grads[[*grads][t % len(grads)]] = None
            params, state = opt.step(params, grads, state)


class NoneRead(TorchDispatchMode):
    """No value leaves its tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_value_is_read() -> None:
    with pytest.raises(AssertionError), NoneRead():
        torch.ones(()).item()
    with telling(FEW), NoneRead():
        forgets(gcfunc.adamw(0.1, gc="gc"), trained(), FEW + 5)


def test_each_loop_is_told() -> None:
    for _ in range(2):
        with telling(FEW):
            forgets(gcfunc.sgd(0.1, gc="gc"), trained(), FEW + 5)


def test_a_warning_that_is_an_error_leaves_params_and_state_as_they_were() -> None:
    opt, params = gcfunc.sgd(0.1, 0.9, gc="gc"), trained()
    state = opt.init(params)
    with pytest.raises(UserWarning, match=SAID.format(FEW + 1)):  # noqa: PT012
        for t in range(FEW + 5):
            params, state = opt.step(params, random_like(params, t), state)
    assert int(state.step) == FEW


# Below, pytest makes any warning an error.


def inner(opt: Optimizer, params: Params, steps: int, *, create_graph: bool) -> Params:
    """Adapt params to a task, differentiably."""
    state = opt.init(params)
    for _ in range(steps):
        loss = torch.stack([(p - 1).pow(4).mean() for p in params.values()]).sum()
        grads = torch.autograd.grad(loss, [*params.values()], create_graph=create_graph)
        params, state = opt.step(params, dict(zip(params, grads, strict=True)), state)
    return params


@pytest.mark.parametrize(
    ("steps", "create_graph"),
    [(5, True), (MANY, True), (5, False), (FEW, False)],
    ids=["MAML", "unrolled", "first-order MAML", "first-order, unrolled"],
)
def test_meta_learning_is_silent(steps: int, create_graph: bool) -> None:
    opt, outer = gcfunc.sgd(0.01, momentum=0.5, gc="gc"), gcfunc.adam(1e-3, gc="gc")
    params = trained()
    state = outer.init(params)
    meta_grads: dict[bool, list[Tensor]] = {}
    for _ in range(3):
        adapted = inner(opt, params, steps, create_graph=create_graph)
        loss = torch.stack([p.square().sum() for p in adapted.values()]).sum()
        grads = torch.autograd.grad(loss, [*params.values()])
        with torch.no_grad():
            params, state = outer.step(params, dict(zip(params, grads, strict=True)), state)
        params = {name: p.requires_grad_() for name, p in params.items()}
    for gc in (True, False):
        opt = gcfunc.sgd(0.01, momentum=0.5, gc="gc" if gc else None)
        adapted = inner(opt, trained(), 2, create_graph=create_graph)
        meta_grads[gc] = [p.detach() for p in adapted.values()]
    assert not torch.equal(meta_grads[True][0], meta_grads[False][0])


def test_truncated_windows_are_silent() -> None:
    """Histories are cut before they get long."""
    opt, params = gcfunc.adamw(0.01, gc="gc"), trained()
    state = opt.init(params)
    for t in range(3 * FEW):
        params, state = opt.step(params, random_like(params, t), state)
        if t % FEW == FEW - 1:
            params, state = pytree.tree_map(lambda x: x.detach(), (params, state))
            params = {name: p.requires_grad_() for name, p in params.items()}


def test_an_lr_that_is_learned_in_windows_is_silent() -> None:
    """However long training takes, if params and state are detached between windows."""
    opt, params = gcfunc.sgd(0.1, 0.9, gc="gc"), make_params()
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    state = opt.init(params)
    for t in range(MANY // 5 + 2):
        params, state = pytree.tree_map(lambda x: x.detach(), (params, state))
        state = gcfunc.update_hyperparams(state, lr=lr)
        for _ in range(5):
            params, state = opt.step(params, random_like(params, t), state)
        (slope,) = torch.autograd.grad(sum(p.sum() for p in params.values()), lr)
        assert float(slope) != 0


def test_inside_of_torch_func_it_is_silent() -> None:
    """However many steps; a function that returns frees them."""
    opt, params = gcfunc.sgd(0.01, gc="gc"), make_params()

    def trained_loss(lr: Tensor, params: Params) -> Tensor:
        state = gcfunc.update_hyperparams(opt.init(params), lr=lr)
        for _ in range(MANY + 5):
            params, state = opt.step(params, {n: 2 * p.detach() for n, p in params.items()}, state)
        return torch.stack([p.square().sum() for p in params.values()]).sum()

    lrs = torch.tensor([0.01, 0.02], dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(trained_loss, argnums=(0, 1)), in_dims=(0, None))
    by_lr, by_params = each(lrs, params)
    assert bool((by_lr != 0).all())
    assert bool((by_params["linear.weight"] != 0).any())


def no_grad(opt: Optimizer, params: Params, steps: int) -> State:
    state = opt.init(params)
    for t in range(steps):
        loss = torch.stack([(p * (p - t)).sum() for p in params.values()]).sum()
        grads = dict(zip(params, torch.autograd.grad(loss, [*params.values()]), strict=True))
        with torch.no_grad():
            params, state = opt.step(params, grads, state)
        params = {name: p.requires_grad_() for name, p in params.items()}
    return state


def detached(opt: Optimizer, params: Params, steps: int) -> State:
    params = {name: p.detach() for name, p in params.items()}
    state = opt.init(params)
    for _ in range(steps):
        grads = torch.func.grad(lambda ps: sum(p.square().sum() for p in ps.values()))(params)
        params, state = opt.step(params, grads, state)
    return state


def donated(opt: Optimizer, params: Params, steps: int) -> State:
    state = opt.init(params)
    step = gcfunc.compile(opt, backend="eager").step
    for t in range(steps):
        params, state = step(params, random_like(params, t), state)
    return state


@pytest.mark.parametrize("way_out", [no_grad, detached, donated])
def test_the_ways_out_are_silent(way_out: Callable[[Optimizer, Params, int], State]) -> None:
    state = way_out(gcfunc.adamw(0.01, gc="gc"), trained(), MANY + 5)
    assert not any(t.requires_grad for t in pytree.tree_leaves(state))
