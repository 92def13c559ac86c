"""That a wrong row kernel is seen. `test_interpreted.py` runs this in a process of its own."""

import pytest
import torch
from torch import Tensor

import gcfunc
from gcfunc._rows import fit, launch

SHAPES = {"conv": (8, 3, 7, 7), "linear": (3, 2048), "long": (2, 9001), "bias": (10,)}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "DEVICES", ("cpu",))


def error(like: str, instead: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """The error of a donated step's params by a kernel in which one text stands for another."""
    real = launch.kernels_of.__wrapped__

    def edited(source: str) -> tuple[object, object]:
        assert like in source
        kernels: tuple[object, object] = real(source.replace(like, instead))
        return kernels

    monkeypatch.setattr(launch, "kernels_of", edited)
    torch.manual_seed(0)
    params = {n: 0.1 * torch.randn(shape) for n, shape in SHAPES.items()}
    grads = {n: torch.randn(shape) + 1 for n, shape in SHAPES.items()}
    exact = {n: p.double() for n, p in params.items()}
    opt = gcfunc.sgd(0.1, 0.9, weight_decay=5e-4, gc="gc")
    want, _ = opt.step(exact, {n: g.double() for n, g in grads.items()}, opt.init(exact))
    gcfunc.compile(opt).step(params, grads, opt.init(params))
    return max(float((params[n] - want[n]).abs().max()) for n in SHAPES)


def test_the_kernel_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert error("width", "width", monkeypatch) < 1e-6


@pytest.mark.parametrize(
    ("like", "instead"),
    [
        ("count = width.to(tl.float32)", "count = (width - 1).to(tl.float32)"),
        ("(column < width)", "(column < width - 1)"),
        ("(offset < numel)", "(offset < numel - 1)"),
        ("tl.where(mask, x, 0.0)", "tl.where(mask, x, 0.0) + 1.0"),
        ("sub = add_1 - mean", "sub = add_1"),
    ],
)
def test_a_broken_one(like: str, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(like, instead, monkeypatch) > 1e-4


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's
def test_infinite_gradients_stay_where_they_are() -> None:
    """A bias is cut into rows as well, but shares no mean with its neighbours."""
    params = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2000)}
    grads = {"weight": torch.ones(2, 3), "bias": torch.ones(2000)}
    grads["bias"][7] = float("inf")
    opt = gcfunc.sgd(0.5, gc="gc")
    gcfunc.compile(opt).step(params, grads, opt.init(params))
    assert params["bias"].isfinite().sum() == 1999
    grads["weight"][0, 0] = float("nan")
    gcfunc.compile(opt).step(params, grads, opt.init(params))
    assert params["weight"].isnan().sum() == 3  # of its own row


def test_gradients_laid_out_otherwise_and_moved() -> None:
    opt = gcfunc.adamw(0.1, gc="gc")
    params = {"conv": torch.randn(4, 3, 3, 3)}
    exact = {"conv": params["conv"].double()}
    state, exact_state, step = opt.init(params), opt.init(exact), gcfunc.compile(opt)
    kept: list[Tensor] = []
    for memory_format in (torch.contiguous_format, torch.channels_last) * 10:
        grads = {"conv": torch.randn(4, 3, 3, 3).to(memory_format=memory_format)}
        kept.append(grads["conv"])
        step.step(params, grads, state)
        own = {"conv": grads["conv"].double()}
        exact, exact_state = opt.step(exact, own, exact_state)
    torch.testing.assert_close(params["conv"].double(), exact["conv"], rtol=0, atol=1e-5)
    launcher = step.planned._serving[0].row_steps[0].launcher  # type: ignore[index]
    assert 1 < len(launcher._tables) <= launch.MOST_TABLES


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (3, 9), (4, 3, 7, 7), (2, 4608), (2, 9001), (1, 8)])
def test_one_gradient_in_one_launch(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[object] = []
    real = launch.kernels_of

    def seen(source: str) -> tuple[object, object]:
        launched.append(source)
        kernels: tuple[object, object] = real(source)
        return kernels

    monkeypatch.setattr("gcfunc._rows.alone.kernels_of", seen)
    g = torch.randn(shape).add(3).to(dtype)
    (found,) = gcfunc.centralize([g])
    wide = g.double()
    want = wide - wide.mean(tuple(range(1, wide.ndim)), keepdim=True)
    assert len(launched) == 1
    assert found.dtype is dtype
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), want, rtol=0, atol=bound)
    if wide[0].numel() > 1:
        assert not torch.allclose(found, g)


def test_a_gradient_that_is_differentiated_is_computed_by_the_formula() -> None:
    g = torch.randn(2, 3, requires_grad=True)
    (found,) = gcfunc.centralize([g])
    assert found.requires_grad
    batched = torch.vmap(lambda x: gcfunc.centralize([x])[0])(torch.randn(4, 2, 3))
    assert float(batched.mean(2).abs().max()) < 1e-6
