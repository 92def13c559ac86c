"""Gradients arrive centralized: for every kind of model, where they are asked to be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gcfunc
from gcfunc import Units
from gcfunc._centralization.where import Where
from gcfunc.hooks import centralize_backward
from tests.distributed import gradients
from tests.hooks.cases import loss_of, mlp, random, require_centralized
from tests.models import ConvNet, TiedMLP

pytestmark = pytest.mark.usefixtures("seeded")


class Shared(nn.Module):
    """One module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.block = nn.Sequential(self.a, nn.Tanh(), self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.tanh(self.a(x)))


class Positions(nn.Module):
    """With a batch of one, autograd hands the table's gradient on as a view of the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.table[None])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    # What comes from a fresh LayerNorm has no mean, and then no gradient of linear1 has.
    nn.init.normal_(layer.norm1.weight)
    return layer


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (5, 4)),
    "CNN": (ConvNet, (5, 2, 5, 5)),
    "transformer": (transformer, (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (5, 2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2)), (5, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (5, 2, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (5, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (5, 4, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 5, 5)),
    "RNN": (lambda: nn.RNN(4, 3, num_layers=2), (5, 2, 4)),
    "LSTM": (lambda: nn.LSTM(4, 3, bidirectional=True), (5, 2, 4)),
    "tied": (lambda: TiedMLP(3), (5, 3)),
    "shared": (Shared, (5, 3)),
    "stolen view": (Positions, (1, 5, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_centralizing_plain_gradients(name: str) -> None:
    build, shape = MODELS[name]
    x = random(*shape)
    require_centralized(build().double(), lambda m: loss_of(m, x).backward())


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("RNN", "LSTM")])
def test_mask_of_what_the_paper_means(name: str) -> None:
    build, shape = MODELS[name]
    model, x = build().double(), random(*shape)
    mask = gcfunc.select(model)
    assert not name.startswith("transposed") or isinstance(mask["weight"], Units)
    require_centralized(model, lambda m: loss_of(m, x).backward(), mask)


WHERES: dict[str, tuple[Where, tuple[str, ...]]] = {
    "gc": ("gc", ("conv.weight", "head.weight")),
    "gcc": ("gcc", ("conv.weight",)),
    "linear": ("linear", ("head.weight",)),
    "predicate": (lambda name, p: name == "head.weight", ("head.weight",)),
    "predicate with units": (lambda name, p: Units(dim=1), ("conv.weight", "head.weight")),
    "mask": ({n: n == "conv.weight" for n, _ in ConvNet().named_parameters()}, ("conv.weight",)),
}


@pytest.mark.parametrize("where", WHERES)
def test_where(where: str) -> None:
    given, names = WHERES[where]
    model, x = ConvNet().double(), random(5, 2, 5, 5)
    require_centralized(model, lambda m: loss_of(m, x).backward(), given)
    assert centralize_backward(model, given).names == names


def test_linear_layer_that_stores_its_transpose() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = conv1d(3, 4).double(), random(5, 4)
    mask = gcfunc.select(model)
    assert mask["weight"] == Units(dim=1)
    require_centralized(model, lambda m: loss_of(m, x).backward(), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    model, x = ConvNet().to(dtype), random(5, 2, 5, 5, dtype=dtype)
    require_centralized(model, lambda m: loss_of(m, x).backward())
    assert {g.dtype for g in gradients(model).values()} == {dtype}


def test_embeddings() -> None:
    words = torch.tensor([[0, 3, 3], [6, 0, 1]])
    require_centralized(Words().double(), lambda m: loss_of(m, words).backward())
