"""Modules that a training step might not take: it works, or an error names the module."""

import contextlib
import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import gcfunc
from gcfunc._tensors.versions import LISTS_ATTRIBUTES, TORCH
from tests.training.cases import EXACT, difference
from tests.training.shared import batch, loss_of
from tests.training.test_shared import places, trained, untouched

MODES: dict[str, Callable[[Any], Any]] = {
    "uncompiled": lambda step: step,
    "pure": lambda step: gcfunc.compile(step, donate=False, backend="aot_eager"),
    "donated": lambda step: gcfunc.compile(step, backend="aot_eager"),
}
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Dynamo reads it of every tensor that it meets, the old weight_norm's among them.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


class Around(nn.Module):
    """A module of width 4 between two layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.inner = inner
        self.after = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(torch.tanh(self.before(x)))
        return self.after(out[0] if isinstance(out, tuple) else out)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Cached(Layer):
    """Makes a tensor once, keeps activations, and starts from a tuple that it replaces."""

    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.table = None
        self.hidden = (torch.zeros(1), torch.zeros(1))
        self.activations: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0, dtype=x.dtype)
        self.activations = self.layer(x + self.table)
        self.hidden = (self.activations, x)
        return self.activations


class Remembering(Layer):
    """Has an attribute only once it was called."""

    def forward(self, x: Tensor) -> Tensor:
        self.activations = super().forward(x)
        return self.activations


class Plain(Layer):
    """Reads a tensor that is not registered, among things that Dynamo cannot read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((4,), 0.5, dtype=torch.float64)
        self.others = threading.Lock(), (i for i in range(3))
        self.array = np.ones(3)
        self.sparse = torch.eye(3).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Images(nn.Module):
    """A normalization of images, on vectors."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.T[None].contiguous())[0].T
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x[None], x[None], x[None])[0][0]
        return out


class Cell(nn.Module):
    """What the error about nn.LSTM advises."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, outs = None, []
        for t in range(len(x)):
            hidden = self.cell(x[t : t + 1], hidden)
            outs.append(hidden[0])
        return torch.cat(outs)


def pruned() -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


WORK: dict[str, Callable[[], nn.Module]] = {
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "prune": pruned,
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "cached": Cached,
    "plain attributes": Plain,
    "instance norm": lambda: Images(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    "instance norm without momentum": lambda: Images(
        nn.InstanceNorm1d(4, momentum=None, track_running_stats=True)  # type: ignore[arg-type]
    ),
    "batch norm evaluated": lambda: nn.BatchNorm1d(4, momentum=None).eval(),
    "attention": Attention,
    "cell": Cell,
}
ONLY_UNCOMPILED: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4, momentum=None),
    "lstm": lambda: nn.LSTM(4, 4, 2),
    "gru": lambda: nn.GRU(4, 4),
    "rnn": lambda: nn.RNN(4, 4),
}


def made(inner: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Around(inner()).double()


def assert_trains_right(inner: Callable[[], nn.Module], mode: str) -> None:
    model = made(inner)
    pure = gcfunc.train_step(model, loss_of, gcfunc.sgd(0.1, 0.9, gc="gc"))
    step, train = MODES[mode](pure), pure.init()
    with untouched(model):
        for t in range(2):
            train, _ = step(train, batch(t))
    assert difference(train, trained(made(inner), "gc", 2)) < EXACT
    assert difference(train, trained(made(inner), None, 2)) > 1e-4


def several() -> nn.Module:
    names = ("old weight_norm", "old spectral_norm", "prune", "cached", "plain attributes")
    return nn.Sequential(*(WORK[name]() for name in names))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", WORK)
def test_what_works(name: str) -> None:
    assert_trains_right(WORK[name], "uncompiled")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_works_compiled() -> None:
    assert_trains_right(several, "donated")


def test_what_works_compiled_and_pure() -> None:
    assert_trains_right(Cached, "pure")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("mode", ["pure", "donated"])
@pytest.mark.parametrize("name", WORK)
def test_what_works_compiled_by_itself(name: str, mode: str) -> None:
    assert_trains_right(WORK[name], mode)


@pytest.mark.parametrize("name", ONLY_UNCOMPILED)
def test_what_works_uncompiled(name: str) -> None:
    assert_trains_right(ONLY_UNCOMPILED[name], "uncompiled")


def test_what_a_forward_keeps_is_not_kept() -> None:
    """As it would be dead, and could be neither copied nor compiled."""
    for kind in (Cached, Remembering, lambda: nn.LSTM(4, 4)):
        model = made(kind)
        step = gcfunc.train_step(model, loss_of, gcfunc.sgd(0.1))
        before = places(model)
        step(step.init(), batch(0))
        assert places(model) == before
        copy.deepcopy(model)


def test_which_versions_list_attributes() -> None:
    """Where Dynamo cannot, a compiled forward may set no attribute that was not there before."""
    failure = pytest.raises(torch._dynamo.exc.BackendCompilerFailed)
    with contextlib.nullcontext() if LISTS_ATTRIBUTES else failure:
        assert_trains_right(Remembering, "donated")


class Checkpointed(Layer):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.layer, x, use_reentrant=self.reentrant)
        return out


class Hooked(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class OldFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Double.apply(super().forward(x))
        return out


class Writing(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9)
        return super().forward(x) - self.mean


class Replacing(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight = nn.Parameter(self.layer.weight * 2)
        return super().forward(x)


class Registering(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if "mask" not in dict(self.named_buffers()):
            self.register_buffer("mask", torch.ones(4))
        return super().forward(x) * self.get_buffer("mask")


class Branching(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Differentiating(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = super().forward(x)
            (g,) = torch.autograd.grad(y.sum(), self.layer.weight, create_graph=True)
        return y + g.sum()


AVERAGE = "torch.compile cannot trace module 'inner' (BatchNorm1d) of the model with momentum=None"
UNCOMPILED = "; or step uncompiled"
ANYWHERE = ("uncompiled", "donated")
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str]] = {
    "checkpoint": (
        lambda: Checkpointed(reentrant=False),
        ("uncompiled",),
        "module 'inner' (Checkpointed) of the model runs torch.utils.checkpoint, which torch.func",
    ),
    "reentrant checkpoint": (
        lambda: Checkpointed(reentrant=True),
        ("uncompiled",),
        "module 'inner' (Checkpointed) of the model runs torch.utils.checkpoint",
    ),
    "saved tensors": (Hooked, ("uncompiled",), "(Hooked) of the model hooks saved tensors"),
    "function": (OldFunction, ("uncompiled",), "a torch.autograd.Function without setup_context"),
    "written": (Writing, ANYWHERE, "'inner' (Writing) of the model writes a tensor in place"),
    "replaced": (Replacing, ("uncompiled",), "replaced 'inner.layer.weight'"),
    "registered": (Registering, ANYWHERE, "made a buffer 'inner.mask' that was none before"),
    "branch": (Branching, ("pure", "donated"), "module 'inner' (Branching) of the model, line "),
    "grad": (Differentiating, ("donated",), "module 'inner' (Differentiating) of the model, line"),
    "batch norm": (ONLY_UNCOMPILED["batch norm"], ("pure", "donated"), AVERAGE),
    "lstm": (ONLY_UNCOMPILED["lstm"], ("pure", "donated"), "(LSTM) of the model as a whole; call"),
    "gru": (ONLY_UNCOMPILED["gru"], ("donated",), "module 'inner' (GRU) of the model as a whole"),
    "script": (
        lambda: torch.jit.script(nn.Linear(4, 4)),
        ("donated",),
        "(RecursiveScriptModule) of the model for its being TorchScript",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, (_, modes, _) in REFUSED.items() for mode in modes]
)
def test_what_is_refused(name: str, mode: str) -> None:
    inner, _, message = REFUSED[name]
    model = made(inner)
    step = MODES[mode](gcfunc.train_step(model, loss_of, gcfunc.sgd(0.1, gc="gc")))
    train = step.init()
    values = [t.clone() for t in train.params.values()]
    with untouched(model), pytest.raises(ValueError, match=re.escape(message)) as raised:
        step(train, batch(0))
    assert (UNCOMPILED in str(raised.value)) == ("torch.compile cannot" in str(raised.value))
    assert all(map(torch.equal, train.params.values(), values))
    assert train.state.step == 0


@pytest.mark.parametrize("mode", ["pure", "donated"])
def test_compiled_checkpoints(mode: str) -> None:
    """Torch 2.11 traces them."""
    refused = pytest.raises(ValueError, match=r"runs torch\.utils\.checkpoint")
    with refused if TORCH >= (2, 12) else contextlib.nullcontext():
        assert_trains_right(lambda: Checkpointed(reentrant=False), mode)
    # A trace that fails leaves them refused everywhere.
    model = Checkpointed(reentrant=False)
    model(torch.ones(2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_compiled_module_is_not_compiled_again() -> None:
    inner: Any = torch.compile(nn.Linear(4, 4), backend="eager")
    for model, message in (
        (nn.Sequential(inner), r"module '0' \(OptimizedModule\) of the model is compiled already"),
        (inner, r"the model \(OptimizedModule\) is compiled already"),
    ):
        step = gcfunc.train_step(model, loss_of, gcfunc.sgd(0.1))
        for donate in (True, False):
            with pytest.raises(ValueError, match=message):
                gcfunc.compile(step, donate=donate)


def test_sparse_gradients_are_refused_at_once() -> None:
    for kind in (nn.Embedding, nn.EmbeddingBag):
        model = nn.Sequential(kind(5, 4, sparse=True))
        with pytest.raises(ValueError, match=r"module '0' .* makes sparse gradients"):
            gcfunc.train_step(model, loss_of, gcfunc.sgd(0.1))
        model.requires_grad_(False).append(nn.Linear(4, 4))
        gcfunc.train_step(model, loss_of, gcfunc.sgd(0.1))


def test_a_loss_of_the_kind() -> None:
    def in_place(out: Tensor) -> Tensor:
        return Double.apply(out).mean()

    step = gcfunc.train_step(nn.Linear(4, 4), in_place, gcfunc.sgd(0.1))
    with pytest.raises(ValueError, match=r"^loss_fn runs a torch.autograd.Function without"):
        step(step.init(), torch.ones(1, 4))


def test_errors_of_the_model_are_its_own() -> None:
    class Failing(Layer):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of luck")

    for mode in MODES:
        step = MODES[mode](gcfunc.train_step(made(Failing), loss_of, gcfunc.sgd(0.1)))
        with pytest.raises(RuntimeError, match=r"^out of luck$"):
            step(step.init(), batch(0))
