"""Shared modules and tied tensors: values as by autograd, and the model stays as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import gcfunc
from tests.cases import Params, largest_difference
from tests.training.cases import EXACT, ByHand, difference, named
from tests.training.shared import SHARED, Everything, TwoNames, batch, loss_of, made

STEPS = 3
FORMS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": lambda step: torch.compile(step.step, fullgraph=True, backend="aot_eager"),
    "pure": lambda step: gcfunc.compile(step, donate=False, backend="aot_eager"),
    "donated": lambda step: gcfunc.compile(step, backend="aot_eager"),
}


def places(model: nn.Module) -> list[tuple[int, str, int]]:
    """Every object of every attribute."""
    return [
        (id(module), name, id(value))
        for module in model.modules()
        for held in (vars(module), module._parameters, module._buffers)
        for name, value in held.items()
    ]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before, values = places(model), named(model)
    yield
    assert places(model) == before
    assert largest_difference(named(model), values) == 0


def trained(model: nn.Module, gc: str | None, steps: int = STEPS) -> nn.Module:
    """The model itself after ordinary steps."""
    optimizer = ByHand(model, gcfunc.sgd(0.1, 0.9, gc=gc))
    for t in range(steps):
        model.zero_grad()
        loss_of(model(batch(t))).backward()
        optimizer.step()
    return model


def assert_trains_right(name: str, form: Callable[[Any], Any]) -> None:
    model = made(name)
    pure = gcfunc.train_step(model, loss_of, gcfunc.sgd(0.1, 0.9, gc="gc"))
    step = form(pure)
    train = pure.init()
    with untouched(model):
        for t in range(STEPS):
            train, _ = step(train, batch(t))
    assert difference(train, trained(made(name), "gc")) < EXACT
    assert difference(train, trained(made(name), None)) > 1e-3


@pytest.mark.parametrize("name", SHARED)
def test_pure_steps(name: str) -> None:
    assert_trains_right(name, lambda step: step)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("TwoNames", form) for form in FORMS),
        ("SharedNorm", "donated"),
        ("TiedAndShared", "pure"),
        *(pytest.param("Everything", form, marks=pytest.mark.slow) for form in FORMS),
    ],
)
def test_compiled_steps(name: str, form: str) -> None:
    assert_trains_right(name, FORMS[form])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_on_inductor() -> None:
    assert_trains_right("TwoNames", gcfunc.compile)


def test_a_forward_that_fails() -> None:
    model = made("Everything")
    step = gcfunc.train_step(model, loss_of, gcfunc.sgd(0.1))
    train = step.init()
    with untouched(model), pytest.raises(RuntimeError):
        step(train, batch(0)[:, :3])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_a_loop_of_ones_own(name: str, packed: bool) -> None:
    """README's, with params packed or not; the model's own buffers do not move."""
    model = made(name)
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    params: Any = {n: p.detach().clone() for n, p in model.named_parameters()}
    if packed:
        params = gcfunc.pack(params)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    state = opt.init(params)

    def loss(params: Any, buffers: Params, x: Tensor) -> tuple[Tensor, Params]:
        buffers = {n: b.clone() for n, b in buffers.items()}
        given = [gcfunc.unpack(params) if packed else params, buffers]
        return loss_of(gcfunc.functional_call(model, given, x)), buffers

    with untouched(model):
        for t in range(STEPS):
            grads, (_, buffers) = grad_and_value(loss, has_aux=True)(params, buffers, batch(t))
            params, state = opt.step(params, grads, state)
    own = gcfunc.unpack(params) if packed else params
    assert largest_difference(own | buffers, named(trained(made(name), "gc"))) < EXACT
    assert largest_difference(own | buffers, named(trained(made(name), None))) > 1e-3


def test_torch_still_ruins_a_module_under_two_names() -> None:
    """pytorch 164759; once this fails, gcfunc.functional_call is for its messages alone."""
    model = TwoNames()
    given = {"a.weight": torch.zeros(4, 4)}
    functional_call(model, given, torch.ones(1, 4))
    assert type(model.a.weight) is Tensor


@pytest.mark.parametrize("name", SHARED)
def test_a_packed_model_trains(name: str) -> None:
    """Its own parameters are views of the packed ones, which steps in place move."""
    model = made(name)
    packed = gcfunc.pack(model)
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    state = opt.init(packed)
    for t in range(STEPS):
        model.zero_grad()
        loss_of(model(batch(t))).backward()
        grads = gcfunc.pack({n: p.grad for n, p in model.named_parameters()}, like=packed)
        new, state = opt.step(packed, grads, state)
        pytree.tree_map(Tensor.copy_, packed, new)
    assert largest_difference(named(model), named(trained(made(name), "gc"))) < EXACT


def gradients(model: nn.Module, through: nn.Module | None = None) -> Params:
    loss_of((through or model)(batch(0))).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_what_is_selected() -> None:
    """Once for each tensor, under the name that named_parameters gives it."""
    model = Everything()
    selected = gcfunc.select(model)
    assert [*selected] == [n for n, _ in model.named_parameters()]
    assert [n for n, taken in selected.items() if taken] == [
        "parts.0.first.0.weight",
        "parts.0.second.a.weight",
        "parts.1.layers.0.0.weight",
        "parts.1.layers.1.0.weight",
        "parts.2.a.parametrizations.weight.original1",
        "parts.3.layer.weight",
        "parts.3.one.layer.weight",
        "last.block.0.weight",
    ]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("how", ["centralize_backward", "register_ddp"])
@pytest.mark.parametrize("name", SHARED)
def test_hooks(name: str, how: str) -> None:
    plain, model = gradients(made(name)), made(name)
    if how == "centralize_backward":
        with gcfunc.hooks.centralize_backward(model) as handle:
            handle.check(model)
            got = gradients(model)
    else:
        ddp = DistributedDataParallel(model)
        gcfunc.hooks.register_ddp(ddp)
        got = gradients(model, ddp)
    assert largest_difference(got, gcfunc.centralize(plain)) < EXACT
    assert largest_difference(got, plain) > 1e-4
