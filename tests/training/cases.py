"""What the tests of training steps share: models, batches, and the ordinary loop."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import GC, Optimizer, TrainState
from tests.cases import Params, largest_difference
from tests.models import ConvNet, TiedMLP

STEPS = 10
EXACT = 1e-10
Loss = Callable[..., Any]
LINEAR = nn.Linear(3, 2)
X, Y = torch.ones(4, 3), torch.ones(4, 2)  # a batch for it


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(ids)))


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def images(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randint(3, (8,), generator=generator)


def vectors(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, x.roll(1, 1)


def tokens(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(seed))
    return ids, ids


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    loss_fn: Loss
    batch: Callable[..., tuple[Tensor, Tensor]]


CASES = {
    "cnn": Case(ConvNet, F.cross_entropy, images),
    "tied": Case(TiedMLP, F.mse_loss, vectors),
    "transformer": Case(Transformer, next_token, tokens),
}
PLAIN: dict[str, tuple[Optimizer, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (
        gcfunc.sgd(0.1, 0.9, weight_decay=0.01),
        lambda params: torch.optim.SGD(params, 0.1, 0.9, weight_decay=0.01),
    ),
    "adamw": (
        gcfunc.adamw(0.01, weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, 0.01, weight_decay=0.1),
    ),
}
CENTRALIZED = {
    "sgd": lambda gc: gcfunc.sgd(0.1, 0.9, weight_decay=0.01, gc=gc),
    "adamw": lambda gc: gcfunc.adamw(0.01, gc=gc and GC(at="update")),
    "ranger": lambda gc: gcfunc.ranger(0.05, k=3, gc=gc),
    "partition": lambda gc: gcfunc.partition(
        {"weights": gcfunc.adam(0.01, gc=gc), "rest": gcfunc.sgd(0.1)},
        lambda name, tensor: "weights" if tensor.ndim > 1 else "rest",
    ),
}


def built(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return case.model().to(dtype)


def named(model: nn.Module) -> Params:
    """The model's parameters and buffers as they are now."""
    return {
        name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]
    }


def difference(train: TrainState, model: nn.Module) -> float:
    return largest_difference(train.params | train.buffers, named(model))


class ByHand:
    """An optimizer of this library on what autograd left in ``.grad``."""

    def __init__(self, model: nn.Module, opt: Optimizer) -> None:
        self.model, self.opt = model, opt
        self.state = opt.init(dict(model.named_parameters()))

    @torch.no_grad()
    def step(self) -> None:
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        grads = {name: p.grad for name, p in params.items()}
        new, self.state = self.opt.step(params, grads, self.state)
        for name, p in params.items():
            p.copy_(new[name])


def ordinary(
    model: nn.Module,
    optimizer: Any,
    loss_fn: Loss,
    x: Tensor,
    y: Tensor,
    *,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
) -> float:
    """One turn of the loop that everybody writes."""
    model.zero_grad()
    total = 0.0
    for xs, ys in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            loss = loss_fn(model(xs), ys) / accumulate
        loss.backward()
        total += loss.item()
    if clip_norm is not None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        assert norm > clip_norm
    optimizer.step()
    return total


def assert_equals_ordinary(
    case: Case,
    opt: Optimizer,
    optimizer: Callable[[nn.Module], Any],
    tolerance: float = EXACT,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> None:
    model, expected = built(case, dtype), built(case, dtype)
    expected_optimizer = optimizer(expected)
    step = gcfunc.train_step(model, case.loss_fn, opt, **options)
    train = step.init()
    for t in range(steps):
        train, loss = step(train, *case.batch(t, dtype))
        batch = case.batch(t, dtype)
        expected_loss = ordinary(expected, expected_optimizer, case.loss_fn, *batch, **options)
        assert abs(float(loss) - expected_loss) <= tolerance
        assert difference(train, expected) <= tolerance
    assert difference(train, model) > 0.01


def storages(tree: Any) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in pytree.tree_leaves(tree)]
