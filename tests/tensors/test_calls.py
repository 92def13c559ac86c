"""A module called with tensors that are not its own."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize

import gcfunc
from tests.models import ConvNet
from tests.training.shared import TiedAndShared, TiedBuffers, TwoContainers, TwoNames

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Grown(nn.Linear):
    """A buffer that the forward replaces."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.seen = self.seen + x.sum(0)
        return super().forward(x) * scale


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = Grown()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def test_as_torchs_where_nothing_is_shared() -> None:
    torch.manual_seed(0)
    model, x = ConvNet(), torch.randn(2, 2, 6, 6)
    params = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    buffers = {n: b + 1 for n, b in model.named_buffers()}
    expected_buffers = {n: b.clone() for n, b in buffers.items()}
    out = gcfunc.functional_call(model, (params, buffers), x)
    assert torch.equal(out, functional_call(model, (params, expected_buffers), (x,)))
    assert not torch.equal(out, model(x))
    for name, b in buffers.items():
        assert torch.equal(b, expected_buffers[name])  # written in place by both


def test_what_is_not_given_is_the_models_own() -> None:
    model = nn.Linear(4, 2)
    out = gcfunc.functional_call(model, {"weight": torch.zeros(2, 4)}, X)
    assert torch.equal(out, model.bias.expand(6, 2))


def test_ways_to_call() -> None:
    model = Grown()
    given = {"weight": torch.eye(4), "bias": torch.zeros(4)}
    for out in (
        gcfunc.functional_call(model, given, X),
        gcfunc.functional_call(model, given, (X,)),
        gcfunc.functional_call(model, given, (X,), {"scale": 1.0}),
        gcfunc.functional_call(model, given, kwargs={"x": X}),
    ):
        torch.testing.assert_close(out, X)


def test_any_name_of_a_shared_tensor() -> None:
    model, weight = TwoContainers(), torch.full((4, 4), 0.1)
    own = [*dict(model.named_parameters(remove_duplicate=False))]
    shared = [n for n in own if n in ("first.0.weight", "first.2.weight", "second.b.weight")]
    shared += ["third.b.weight"]
    assert len({*shared}) == 4
    outs = [gcfunc.functional_call(model, {name: weight}, X) for name in shared]
    outs += [gcfunc.functional_call(model, dict.fromkeys(shared, weight), X)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not torch.equal(outs[0], model(X))


def test_a_packed_tree() -> None:
    model = TiedAndShared()
    packed = gcfunc.pack({n: p.detach() + 1 for n, p in model.named_parameters()})
    out = gcfunc.functional_call(model, packed, X)
    assert torch.equal(out, gcfunc.functional_call(model, gcfunc.unpack(packed), X))
    assert not torch.equal(out, model(X))


def test_replaced_buffers_are_handed_back() -> None:
    """By whichever name and in whichever dict they were given; the model keeps its own."""
    model = Twice()
    own = model.a.seen
    for name in ("a.seen", "b.seen"):
        buffers = {name: torch.zeros(4)}
        params = {"a.weight": torch.eye(4), "a.bias": torch.zeros(4)}
        gcfunc.functional_call(model, [params, buffers], X)
        torch.testing.assert_close(buffers[name], 2 * X.sum(0))
        assert model.a.seen is own
        assert not own.any()


def test_grad_and_vmap() -> None:
    models = [TwoNames() for _ in range(3)]
    params, _ = stack_module_state(models)

    def loss(params: Any, x: Tensor) -> Tensor:
        out: Tensor = gcfunc.functional_call(models[0], params, x)
        return out.square().sum()

    grads = vmap(grad(loss), (0, None))(params, X)
    for i, model in enumerate(models):
        model(X).square().sum().backward()
        torch.testing.assert_close(grads["a.weight"][i], model.a.weight.grad)
    assert type(models[0].a.weight) is nn.Parameter


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", [TwoNames, TiedAndShared, TiedBuffers])
def test_compiled_without_graph_breaks(kind: type[nn.Module]) -> None:
    model = kind()
    own = [*model.parameters(), *model.buffers()]

    def loss(params: Any, buffers: Any, x: Tensor) -> Tensor:
        given = params, {n: b.clone() for n, b in buffers.items()}
        out: Tensor = gcfunc.functional_call(model, given, x)
        return out.square().sum()

    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, buffers, X), grad(loss)(params, buffers, X))
    assert all(t is u for t, u in zip(own, [*model.parameters(), *model.buffers()], strict=True))


def test_a_call_within_a_call() -> None:
    """Of the model by itself, with yet other tensors."""

    class Calling(TwoNames):
        inner: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.inner is None:
                self.inner = x
                self.inner = gcfunc.functional_call(self, {"a.weight": torch.eye(4) * 2}, x)
            return super().forward(x)

    model = Calling()
    out = gcfunc.functional_call(model, {"b.weight": torch.eye(4) * 3}, X)
    torch.testing.assert_close(model.inner, 2 * torch.tanh(2 * X))
    torch.testing.assert_close(out, 3 * torch.tanh(3 * X))
    assert type(model.a.weight) is nn.Parameter


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    model = nn.Linear(4, 4)
    parametrize.register_parametrization(model, "weight", Doubled())
    return model


def test_parametrized() -> None:
    given = {"parametrizations.weight.original": torch.eye(4), "bias": torch.zeros(4)}
    torch.testing.assert_close(gcfunc.functional_call(parametrized(), given, X), 2 * X)


BAD: dict[str, tuple[type[Exception], str, Any, Any]] = {
    "no module": (TypeError, "model must be a torch.nn.Module", torch.tanh, {}),
    "no dict": (TypeError, "must be a dict of tensors by name, a packed tree", TwoNames(), X),
    "no tensor": (
        TypeError,
        "'a.weight' must be a tensor, got NoneType",
        TwoNames(),
        {"a.weight": None},
    ),
    "unknown": (
        ValueError,
        "params_and_buffers does not match the model; unexpected 'a.wieght', 'c.weight'",
        TwoNames(),
        {"a.weight": X, "a.wieght": X, "c.weight": X},
    ),
    "a module's name": (ValueError, "unexpected 'a'", TwoNames(), {"a": X}),
    "parametrized weight": (ValueError, "unexpected 'weight'", parametrized(), {"weight": X}),
    "twice": (
        ValueError,
        "'a.weight' is in two of the dicts",
        TwoNames(),
        ({"a.weight": X}, {"a.weight": X}),
    ),
    "two for one": (
        ValueError,
        "'embed.weight' and 'heads.0.weight' are one tensor of the model, and two are given",
        TiedAndShared(),
        {"embed.weight": X, "heads.0.weight": X.clone()},
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    error, message, model, given = BAD[bad]
    own = [*model.parameters()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=re.escape(message)):
        gcfunc.functional_call(model, given, X)
    if own:
        assert all(p is q for p, q in zip(own, model.parameters(), strict=True))
