"""torch.func through steps: grad, jvp, vmap, and their combinations."""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import GC, Optimizer, State
from gcfunc._catalog import CATALOG, Algorithm
from gcfunc._tensors.lists import under_vmap
from tests.cases import ALGORITHMS, Params, largest_difference

STEPS = 3
EXACT = 1e-12
H = 1e-6
MODELS = 3
LRS = torch.tensor([0.01, 0.1, 0.3], dtype=torch.float64)

AT = pytest.mark.parametrize("at", ["gradient", "update"])
NAME = pytest.mark.parametrize("name", ALGORITHMS)
# RAdam trusts its variance from the sixth step on.
TAKEN = pytest.mark.parametrize("taken", [0, 5], ids="after {}".format)


def _by_lr(row: Algorithm) -> Callable[..., Optimizer]:
    own = {"k": 2} if row.takes("k") else {}
    return lambda lr, gc: row.make(gc=gc, lr=lr, **own)


BY_LR = {name: _by_lr(row) for name, row in CATALOG.items()}


def draw(seed: int, *batch: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (2, 3), "bias": (2,)}
    return {
        name: torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


WEIGHTS = draw(99)


def take(tree: Any, i: int) -> Any:
    return pytree.tree_map(lambda t: t[i], tree)


def stack(trees: list[Any]) -> Any:
    return pytree.tree_map(lambda *ts: torch.stack(ts), *trees)


def after(opt: Optimizer, steps: int) -> State:
    params = draw(0)
    state = opt.init(params)
    for t in range(steps):
        params, state = opt.step(params, draw(10 + t), state)
    return state


def run(opt: Optimizer, state: State, params: Params, grads: list[Params]) -> Params:
    for g in grads:
        params, state = opt.step(params, g, state)
    return params


def score(params: Params) -> Tensor:
    """A scalar that weighs every entry differently."""
    return torch.stack([(WEIGHTS[n] * p).sum() for n, p in params.items()]).sum()


@TAKEN
@AT
@NAME
def test_gradcheck(name: str, at: Any, taken: int) -> None:
    """Reverse and forward mode, w.r.t. params, every gradient and every real hyperparameter."""
    opt = ALGORITHMS[name](GC("gc", at=at))
    start = after(opt, taken)
    real = [n for n, h in start.hyperparams.items() if h.is_floating_point()]
    trees = [draw(100 + t) for t in range(1 + STEPS)]
    _, spec = pytree.tree_flatten(trees)

    def f(*inputs: Tensor) -> tuple[Tensor, ...]:
        hyperparams = start.hyperparams | dict(zip(real, inputs, strict=False))
        params, *grads = pytree.tree_unflatten(inputs[len(real) :], spec)
        new = run(opt, start._replace(hyperparams=hyperparams), params, grads)
        return tuple(new.values())

    inputs = [start.hyperparams[n].clone() for n in real] + pytree.tree_leaves(trees)
    for leaf in inputs:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(f, inputs, atol=1e-6, rtol=1e-4, check_forward_ad=True)


@AT
@NAME
def test_func_grad_is_autograd(name: str, at: Any) -> None:
    opt = ALGORITHMS[name](GC("gc", at=at))
    start = after(opt, 5)

    def f(lr: Tensor, params: Params, grads: list[Params]) -> Tensor:
        return score(run(opt, gcfunc.update_hyperparams(start, lr=lr), params, grads))

    inputs = (LRS[1].clone(), draw(1), [draw(100 + t) for t in range(STEPS)])
    by_func = pytree.tree_leaves(grad(f, argnums=(0, 1, 2))(*inputs))
    leaves = pytree.tree_leaves(inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    lr, params, grads = inputs
    # As it is where only the sign of gradients counts.
    flat = bool(f(lr, params, pytree.tree_map(lambda g: g + H, grads)) == f(*inputs))
    own = len(pytree.tree_leaves((lr, params)))
    by_autograd = torch.autograd.grad(f(*inputs), leaves)
    for i, (a, b) in enumerate(zip(by_func, by_autograd, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)
        assert bool(a.abs().max() > 0) or (flat and i >= own)


@AT
@pytest.mark.parametrize("name", BY_LR)
def test_lr_in_the_constructor_is_lr_in_the_state(name: str, at: Any) -> None:
    gc = GC("gc", at=at)
    params, grads = draw(1), [draw(100 + t) for t in range(STEPS)]

    def constructed(lr: Tensor) -> Tensor:
        opt = BY_LR[name](lr=lr, gc=gc)
        return score(run(opt, opt.init(params), params, grads))

    def updated(lr: Tensor) -> Tensor:
        opt = BY_LR[name](lr=0.7, gc=gc)
        return score(run(opt, gcfunc.update_hyperparams(opt.init(params), lr=lr), params, grads))

    lr = LRS[1].clone()
    numerical = (constructed(lr + H) - constructed(lr - H)) / (2 * H)
    assert abs(float(numerical)) > 1e-3
    for f in (constructed, updated):
        torch.testing.assert_close(grad(f)(lr), numerical, rtol=1e-6, atol=0)
        tangent = jvp(f, (lr,), (torch.ones_like(lr),))[1]
        torch.testing.assert_close(tangent, numerical, rtol=1e-6, atol=0)


@TAKEN
@AT
@NAME
def test_jvp(name: str, at: Any, taken: int) -> None:
    opt = ALGORITHMS[name](GC("gc", at=at))
    start = after(opt, taken)

    def f(lr: Tensor, params: Params, grads: list[Params]) -> Params:
        return run(opt, gcfunc.update_hyperparams(start, lr=lr), params, grads)

    here = (LRS[1].clone(), draw(1), [draw(100 + t) for t in range(STEPS)])
    along = (LRS[0].clone(), draw(2), [draw(200 + t) for t in range(STEPS)])
    out, tangent = jvp(f, here, along)[:2]
    ahead, behind = (f(*pytree.tree_map(lambda x, v, h=h: x + h * v, here, along)) for h in (H, -H))
    numerical = {n: (ahead[n] - behind[n]) / (2 * H) for n in ahead}
    assert largest_difference(out, f(*here)) <= EXACT
    assert largest_difference(tangent, numerical) <= 1e-7


@pytest.mark.parametrize("gc", [None, GC("gc"), GC("gc", at="update")], ids=["plain", "gc", "gc2"])
@pytest.mark.parametrize(
    "build",
    [
        *(partial(row.make, lr=0.01, weight_decay=0.0) for row in CATALOG.values()),
        lambda gc: gcfunc.adam(amsgrad=True, gc=gc),
        lambda gc: gcfunc.rmsprop(centered=True, gc=gc),
    ],
    ids=[*CATALOG, "amsgrad", "centered"],
)
def test_finite_at_gradients_of_zero(build: Callable[..., Optimizer], gc: GC | None) -> None:
    """Where a second moment is exactly zero, and the root's own derivative infinite."""
    opt = build(gc=gc)
    params, dead = draw(1), draw(2)
    dead["weight"][0] = 0
    # A row of equal gradients, which GC makes a row of zeros.
    dead["weight"][1] = 0.25
    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    lr = torch.tensor(0.1, dtype=torch.float64)
    for grads in ([zeros] * 8, [dead] * 8):

        def f(lr: Tensor, params: Params, grads: list[Params]) -> Tensor:
            start = gcfunc.update_hyperparams(opt.init(params), lr=lr)
            return score(run(opt, start, params, grads))

        inputs = (lr, params, grads)
        for d in pytree.tree_leaves(grad(f, argnums=(0, 1, 2))(*inputs)):
            assert bool(d.isfinite().all())
        tangent = jvp(f, inputs, pytree.tree_map(torch.ones_like, inputs))[1]
        assert bool(tangent.isfinite())
        # Nothing moves where gradients are zero: the derivative is that of the identity.
        by_params = grad(f, argnums=1)(*inputs)
        assert torch.equal(by_params["weight"][0], WEIGHTS["weight"][0])


def ensemble(opt: Optimizer) -> tuple[Params, State]:
    """Models side by side, a different lr each."""
    models = [draw(i) for i in range(MODELS)]
    states = [
        gcfunc.update_hyperparams(opt.init(p), lr=lr) for p, lr in zip(models, LRS, strict=True)
    ]
    return stack(models), stack(states)


def assert_separate_runs(
    opt: Optimizer, step: Callable[[Params, Params, State], tuple[Params, State]]
) -> None:
    """The vmapped step does to each model and its state what the step does to it alone."""
    params, state = ensemble(opt)
    alone = [(take(params, i), take(state, i)) for i in range(MODELS)]
    for t in range(4):
        grads = draw(100 + t, MODELS)
        params, state = step(params, grads, state)
        alone = [opt.step(p, take(grads, i), s) for i, (p, s) in enumerate(alone)]
    for a, b in zip(
        pytree.tree_leaves((params, state)), pytree.tree_leaves(stack(alone)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)
    displacement = [(params["weight"][i] - draw(i)["weight"]).abs().max() for i in range(MODELS)]
    assert displacement[0] < displacement[1] < displacement[2]


@AT
@NAME
def test_an_ensemble_equals_separate_runs(name: str, at: Any) -> None:
    opt = ALGORITHMS[name](GC("gc", at=at))
    assert_separate_runs(opt, vmap(opt.step))


@NAME
def test_an_ensemble_is_made_under_vmap(name: str) -> None:
    opt = ALGORITHMS[name](GC("gc"))
    params, state = ensemble(opt)
    made = vmap(lambda p, lr: gcfunc.update_hyperparams(opt.init(p), lr=lr))(params, LRS)
    assert pytree.tree_structure(made) == pytree.tree_structure(state)
    for a, b in zip(pytree.tree_leaves(made), pytree.tree_leaves(state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "aot_eager") for name in ALGORITHMS]
    + [(name, "inductor") for name in ("sgd-momentum", "adamw")],
)
def test_a_compiled_ensemble_equals_separate_runs(name: str, backend: str) -> None:
    opt = ALGORITHMS[name](GC("gc"))
    step = torch.compile(vmap(opt.step), fullgraph=True, backend=backend)
    calls = count()

    def checked(params: Params, grads: Params, state: State) -> tuple[Params, State]:
        with torch.compiler.set_stance("fail_on_recompile" if next(calls) else "default"):
            return step(params, grads, state)

    assert_separate_runs(opt, checked)


@NAME
def test_training_an_ensemble_under_vmap(name: str) -> None:
    """vmap of grad: each model's own gradient, and its own step."""
    opt = ALGORITHMS[name](GC("gc"))
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    x = torch.randn(MODELS, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def train(params: Params, state: State, x: Tensor) -> tuple[Params, State]:
        def loss(params: Params) -> Tensor:
            return (functional_call(model, params, (x,)) - 1).square().sum()

        for _ in range(STEPS):
            params, state = opt.step(params, grad(loss)(params), state)
        return params, state

    params, state = ensemble(opt)
    together, _ = vmap(train)(params, state, x)
    for i in range(MODELS):
        alone, _ = train(take(params, i), take(state, i), x[i])
        assert largest_difference(take(together, i), alone) <= EXACT


@NAME
def test_hypergradients_of_an_ensemble(name: str) -> None:
    """vmap of grad and grad of vmap through the steps, w.r.t. each model's lr."""
    opt = ALGORITHMS[name](GC("gc"))
    params, state = ensemble(opt)
    grads = [draw(100 + t, MODELS) for t in range(STEPS)]

    def f(lr: Tensor, params: Params, state: State, grads: list[Params]) -> Tensor:
        return score(run(opt, gcfunc.update_hyperparams(state, lr=lr), params, grads))

    inside = vmap(grad(f))(LRS, params, state, grads)
    outside = grad(lambda lrs: vmap(f)(lrs, params, state, grads).sum())(LRS)
    alone = [
        grad(f)(LRS[i], take(params, i), take(state, i), take(grads, i)) for i in range(MODELS)
    ]
    for together in (inside, outside):
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=EXACT)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_a_compiled_hypergradient(name: str) -> None:
    opt = ALGORITHMS[name](GC("gc"))
    params, grads = draw(1), [draw(100 + t) for t in range(STEPS)]

    def f(lr: Tensor) -> Tensor:
        return score(run(opt, gcfunc.update_hyperparams(opt.init(params), lr=lr), params, grads))

    compiled = torch.compile(grad(f), fullgraph=True, backend="aot_eager")
    for lr in LRS:
        torch.testing.assert_close(compiled(lr), grad(f)(lr), rtol=0, atol=EXACT)


@pytest.mark.usefixtures("fresh_compiler")
def test_under_vmap() -> None:
    """The private hook still tells; it must, for as long as the test below passes."""

    def told(x: Tensor) -> Tensor:
        return x * 0 + under_vmap()

    def total(x: Tensor) -> Tensor:
        return (x * told(x)).sum()

    x = torch.ones(2)
    assert under_vmap() is False
    assert told(x).tolist() == [0, 0]
    assert vmap(told)(x).tolist() == [1, 1]
    assert vmap(vmap(told))(torch.ones(1, 1)).tolist() == [[1]]
    assert grad(total)(x).tolist() == [0, 0]
    assert jvp(told, (x,), (x,))[0].tolist() == [0, 0]
    assert vmap(grad(total))(x).tolist() == [1, 1]
    assert grad(lambda x: vmap(total)(x).sum())(x).tolist() == [1, 1]
    compiled = torch.compile(vmap(told), fullgraph=True, backend="aot_eager")
    assert compiled(x).tolist() == [1, 1]
    compiled = torch.compile(told, fullgraph=True, backend="aot_eager")
    assert compiled(x).tolist() == [0, 0]


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch._foreach_add([x], [x]),
        lambda x: torch._foreach_mul([x], x.sum()),
        lambda x: torch._foreach_sqrt([x]),
    ],
    ids=["list", "scalar", "unary"],
)
def test_foreach_still_has_no_batching_rule(operation: Callable[[Tensor], list[Tensor]]) -> None:
    """Once this fails, _tensors/lists.py needs neither the hook nor the loop."""
    with pytest.raises(RuntimeError, match=r"[Bb]atching rule"):
        vmap(lambda x: operation(x)[0])(torch.ones(2, 3))


def test_foreach_still_has_no_derivative_of_a_scalar() -> None:
    """Once this fails, _tensors/lists.py may hand scalars to foreach as they are."""
    x, s = torch.ones(2), torch.tensor(3.0)

    def plus(s: Tensor) -> Tensor:
        return torch._foreach_add([x], s)[0]

    def times(s: Tensor) -> Tensor:
        return torch.stack(torch._foreach_mul([x, x], s))

    assert jvp(plus, (s,), (s,))[1].tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="inconsistent range"):
        grad(lambda s: times(s).sum())(s)


@pytest.mark.usefixtures("fresh_compiler")
def test_foreach_still_makes_a_scalar_a_constant() -> None:
    """Likewise: a schedule of eps would recompile every step."""

    def plus(x: Tensor, s: Tensor) -> Tensor:
        return torch._foreach_add([x], s)[0]

    compiled = torch.compile(plus, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, dtype=torch.float64)
    compiled(x, LRS[0])
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        compiled(x, LRS[1])


@pytest.mark.parametrize("beta2", [0.5, 0.999])
def test_radam_has_a_derivative_where_it_never_trusts_its_variance(beta2: float) -> None:
    """With beta2 below 0.6 the rectification has no real value at any step."""

    def loss(beta2: Tensor) -> Tensor:
        params, opt = torch.ones(2, 3).double(), gcfunc.radam(0.1, (0.9, 0.99))
        state = gcfunc.update_hyperparams(opt.init(params), beta2=beta2)
        for t in range(3):
            params, state = opt.step(params, torch.full((2, 3), 1.0 + t).double(), state)
        return params.sum()

    value = torch.tensor(beta2, dtype=torch.float64)
    assert loss(value).isfinite()
    assert torch.func.grad(loss)(value).isfinite()
