"""What goes wrong on a GPU, and leaves all as it was. `test_interpreted.py` runs this by itself."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gcfunc
from gcfunc._compiled.rows import program_for
from gcfunc._rows import alone, fit, launch
from gcfunc.hooks import centralize_backward
from tests.cases import ALGORITHMS

Params = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "DEVICES", ("cpu",))
    monkeypatch.setattr(alone, "_BROKEN", set())


def made() -> tuple[Params, Params]:
    torch.manual_seed(0)
    shapes = {"weight": (4, 6), "bias": (4,)}
    params, grads = ({n: torch.randn(s) for n, s in shapes.items()} for _ in range(2))
    return params, grads


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g: g.half(),
        lambda g: g.double(),
        lambda g: g.long(),
        lambda g: g[:2],
        lambda g: g.flatten(),
        lambda g: g.t(),
        lambda g: g.to("meta"),
    ],
)
def test_a_gradient_of_a_later_step_that_does_not_fit(wrong: Callable[[Tensor], Tensor]) -> None:
    params, grads = made()
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    state, step = opt.init(params), gcfunc.compile(opt)
    step.step(params, grads, state)
    before = {n: p.clone() for n, p in params.items()}
    with pytest.raises((TypeError, ValueError), match="grads"):
        step.step(params, grads | {"weight": wrong(grads["weight"])}, state)
    assert all(torch.equal(params[n], before[n]) for n in params)
    assert int(state.step) == 1


def test_a_step_is_a_write_in_place_to_autograd() -> None:
    params, grads = made()
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    state, step = opt.init(params), gcfunc.compile(opt)
    weight = params["weight"].requires_grad_()
    loss = (weight * weight).sum()
    step.step(params, grads, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_kernel_that_does_not_start(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two kernels, the first or the second. A drop-in goes on without, and steps once."""
    real = launch.kernels_of

    class Dead:
        __name__ = "dead"

        def __getitem__(self, grid: object) -> object:
            raise RuntimeError("no compiler for C")

    def kernels(source: str) -> tuple[Any, ...]:
        own = [*real(source)]
        own[broken] = Dead()
        return tuple(own)

    def trained(gc: str | None, *, compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        sizes = ((4, 9000), (4, 6), (4,))
        params = [nn.Parameter(torch.randn(size)) for size in sizes]
        optimizer = gcfunc.optim.SGD(params, 0.1, momentum=0.9, gc=gc, compile=compiled or None)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p).cumsum(-1)
            optimizer.step()
        return [p.detach() for p in params]

    params, grads = made()
    params["long"], grads["long"] = torch.randn(2, 9000), torch.randn(2, 9000)
    before = {n: p.clone() for n, p in params.items()}
    monkeypatch.setattr("gcfunc.optim.base.COMPILE_FROM", 1)
    monkeypatch.setattr(launch, "kernels_of", kernels)
    opt = gcfunc.sgd(0.1, gc="gc")
    state = opt.init(params)
    with pytest.raises(launch.LaunchError, match="no compiler for C"):
        gcfunc.compile(opt).step(params, grads, state)
    assert all(torch.equal(params[n], before[n]) for n in params)
    assert int(state.step) == 0
    with pytest.warns(UserWarning, match="not compiled"):
        have = trained("gc", compiled=False)
    monkeypatch.setattr(launch, "kernels_of", real)
    want, plain = trained("gc", compiled=True), trained(None, compiled=True)
    for h, w in zip(have, want, strict=True):
        torch.testing.assert_close(h, w)
    assert not torch.allclose(have[0], plain[0])


def test_hooks_go_on_where_no_kernel_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(source: str) -> tuple[Any, Any]:
        raise RuntimeError("no compiler for C")

    monkeypatch.setattr(alone, "kernels_of", nothing)
    model = nn.Linear(5, 3)
    centralize_backward(model)
    with pytest.warns(UserWarning, match="no compiler for C"):
        model(torch.randn(4, 5)).square().sum().backward()
    model(torch.randn(4, 5)).square().sum().backward()  # says it once
    grad = model.weight.grad
    assert grad is not None
    assert float(grad.mean(1).abs().max()) < 1e-6 < float(grad.abs().max())


def test_first_programs_in_threads() -> None:
    """Tracing patches nn.Module for all threads; afterwards it is as it was."""
    call = nn.Module.__call__
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def steps(name: str) -> None:
        (algorithm,) = ALGORITHMS[name]("gc").algorithms.values()
        barrier.wait()
        try:
            assert program_for(algorithm, torch.float32) is not None
        except BaseException as error:
            failures.append(error)

    names = ("sgd", "adamw", "radam", "lion")
    threads = [threading.Thread(target=steps, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert nn.Module.__call__ is call


def test_pure_steps_take_sizes_that_change_for_symbols() -> None:
    torch.compiler.reset()
    opt = gcfunc.sgd(0.1, gc="gc")
    step = gcfunc.compile(opt, donate=False)
    for n in range(3, 9):
        params, grads = {"w": torch.randn(n, n + 3)}, {"w": torch.randn(n, n + 3)}
        new, _ = step.step(params, grads, opt.init(params))
        want, _ = opt.step(params, grads, opt.init(params))
        torch.testing.assert_close(new["w"], want["w"])


def test_within_a_compilation_of_ones_own() -> None:
    torch.compiler.reset()
    opt = gcfunc.sgd(0.1, gc="gc")
    pure = gcfunc.compile(opt, donate=False)
    params, grads = made()
    new, _ = torch.compile(pure.step, fullgraph=True)(params, grads, opt.init(params))
    want, _ = opt.step(params, grads, opt.init(params))
    torch.testing.assert_close(new["weight"], want["weight"])


def test_strides_of_dimensions_of_size_one_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"depthwise": torch.randn(9, 1, 3, 1)}
    grads = {"depthwise": torch.randn(9, 3).as_strided((9, 1, 3, 1), (3, 7, 1, 5))}
    opt = gcfunc.sgd(0.1, gc="gc")
    want, _ = opt.step(params, grads, opt.init(params))
    copies: list[Tensor] = []
    real = torch.empty_strided

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        copies.append(real(*args, **kwargs))
        return copies[-1]

    monkeypatch.setattr(torch, "empty_strided", seen)
    gcfunc.compile(opt).step(params, grads, opt.init(params))
    assert params["depthwise"].shape not in {copy.shape for copy in copies}
    torch.testing.assert_close(params["depthwise"], want["depthwise"])


def test_views_that_negate_and_traces_see_the_formula() -> None:
    g = torch.randn(3, 5)
    negated = torch._neg_view(g)
    torch.testing.assert_close(gcfunc.centralize([negated])[0], -gcfunc.centralize([g])[0])
    params, opt = {"w": torch.randn(3, 5)}, gcfunc.sgd(1.0, gc="gc")
    want, _ = opt.step(params, {"w": -g}, opt.init(params))
    gcfunc.compile(opt).step(params, {"w": negated}, opt.init(params))
    torch.testing.assert_close(params["w"], want["w"])
    graph: Any = torch.fx.experimental.proxy_tensor.make_fx(lambda x: gcfunc.centralize([x])[0])(g)
    assert "mean" in str(graph.graph)


def test_scalars_on_another_device_or_of_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: t)  # which needs a GPU
    scalars = [torch.tensor(3), torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)]
    moved = launch.near(scalars, torch.device("meta"))
    assert [t.dtype for t in moved] == [torch.int64, torch.float64, torch.float64]
    assert launch.near(scalars, torch.device("cpu")) is scalars


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_gradient_that_a_process_still_waits_for() -> None:
    """Its own address is 0."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    params, grads = made()
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    want, _ = opt.step(params, grads, opt.init(params))
    pending: Any = AsyncCollectiveTensor(grads["weight"])
    assert pending.data_ptr() == 0
    gcfunc.compile(opt).step(params, grads | {"weight": pending}, opt.init(params))
    torch.testing.assert_close(params["weight"], want["weight"])
