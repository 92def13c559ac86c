"""``gcfunc.train_step``: what the ordinary loop computes, as one pure function and one graph."""

import collections
import contextlib
import copy
import io
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import GC, Optimizer, TrainState
from tests.cases import Params, largest_difference

STEPS = 10
EXACT = 1e-10
Loss = Callable[..., Any]


class ConvNet(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.drop(features))


class TiedMLP(nn.Module):
    """An autoencoder whose halves are one weight, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6)
        self.out.weight = self.hidden.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.tanh(self.hidden(x)))


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


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: str, name: str) -> None:
    opt, torch_optim = PLAIN[name]
    assert_equals_ordinary(CASES[case], opt, lambda model: torch_optim(model.parameters()))


@pytest.mark.parametrize("name", CENTRALIZED)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_optimizer_on_the_gradients_of_autograd(case: str, name: str) -> None:
    opt = CENTRALIZED[name]("gc")
    assert_equals_ordinary(CASES[case], opt, lambda model: ByHand(model, opt))


@pytest.mark.parametrize("name", CENTRALIZED)
def test_gc_makes_a_difference(name: str) -> None:
    case, trains = CASES["cnn"], []
    for gc in ("gc", None):
        step = gcfunc.train_step(built(case), case.loss_fn, CENTRALIZED[name](gc))
        trains.append(step(step.init(), *case.batch(0))[0])
    assert largest_difference(trains[0].params, trains[1].params) > 1e-3


def test_sgd_with_gc_written_out() -> None:
    """Decay joins the gradient and is centralized with it; momentum comes after."""
    case, lr, momentum, decay = CASES["cnn"], 0.1, 0.9, 0.01
    model, expected = built(case), built(case)
    opt = gcfunc.sgd(lr, momentum, weight_decay=decay, gc="gc")
    step = gcfunc.train_step(model, case.loss_fn, opt)
    train = step.init()
    params = [*expected.parameters()]
    buffers: list[Tensor | None] = [None] * len(params)
    for t in range(STEPS):
        train, _ = step(train, *case.batch(t))
        x, y = case.batch(t)
        grads = torch.autograd.grad(case.loss_fn(expected(x), y), params)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                u = g + decay * p
                if u.ndim > 1:
                    u = u - u.mean(tuple(range(1, u.ndim)), keepdim=True)
                old = buffers[i]
                b = buffers[i] = u if old is None else momentum * old + u
                p.sub_(lr * b)
    assert difference(train, expected) < EXACT


OPTIONS: dict[str, dict[str, Any]] = {
    "clip_norm": {"clip_norm": 0.05},
    "accumulate": {"accumulate": 4},
    "both": {"clip_norm": 0.05, "accumulate": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_clipping_and_accumulation(case: str, options: str) -> None:
    """BatchNorm's statistics, which follow every micro-batch, included."""
    opt = gcfunc.sgd(0.5, 0.9, weight_decay=0.01, gc="gc")
    assert_equals_ordinary(CASES[case], opt, lambda model: ByHand(model, opt), **OPTIONS[options])


def test_a_small_gradient_is_not_clipped() -> None:
    case, opt = CASES["tied"], gcfunc.sgd(0.1)
    train, _ = gcfunc.train_step(built(case), case.loss_fn, opt, clip_norm=1e6)(
        (step := gcfunc.train_step(built(case), case.loss_fn, opt)).init(), *case.batch(0)
    )
    assert largest_difference(train.params, step(step.init(), *case.batch(0))[0].params) == 0


def test_clipping_comes_before_centralization() -> None:
    """A gradient that is all mean has a norm to clip, and nothing is left of it afterwards."""
    model = nn.Linear(3, 1)
    opt = gcfunc.sgd(1.0, gc="gc")
    step = gcfunc.train_step(model, lambda out: out.sum(), opt, clip_norm=1.0)
    train = step.init()
    stepped, _ = step(train, torch.full((1, 3), 100.0))
    torch.testing.assert_close(stepped.params["weight"], train.params["weight"])
    moved = train.params["bias"] - stepped.params["bias"]
    torch.testing.assert_close(moved, torch.tensor([1 / 30001**0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str, dtype: torch.dtype) -> None:
    """The same kernels in the same precision; a tied weight's two gradients are added wider."""
    opt, torch_optim = PLAIN["sgd"]
    assert_equals_ordinary(
        CASES[case],
        opt,
        lambda model: torch_optim(model.parameters()),
        dtype=torch.float32,
        tolerance=1e-6 if case == "cnn" else 5e-3,
        steps=3,
        autocast=dtype,
    )


def test_autocast_computes_in_16_bits() -> None:
    dtypes = []

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        dtypes.append(out.dtype)
        return F.cross_entropy(out, y)

    for autocast in (None, torch.bfloat16):
        model = built(CASES["cnn"], torch.float32)
        step = gcfunc.train_step(model, loss_fn, gcfunc.sgd(0.1), autocast=autocast)
        train, loss = step(step.init(), *images(0, torch.float32))
        assert loss.dtype is train.params["head.weight"].dtype is torch.float32
    assert dtypes == [torch.float32, torch.bfloat16]


def test_16_bit_gradients_are_summed_wide() -> None:
    """256 + 1 + 1 + ... in bfloat16 stays 256."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    opt = gcfunc.sgd(1.0)
    step = gcfunc.train_step(model, lambda out: out.sum(), opt, accumulate=8)
    train = step.init()
    train.params["weight"].zero_()
    x = torch.tensor([[2048.0], *[[8.0]] * 7], dtype=torch.bfloat16)
    stepped, _ = step(train, x)
    assert stepped.params["weight"].item() == -264
    assert stepped.params["weight"].dtype is torch.bfloat16


def logits_and_accuracy(out: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
    accuracy = (out.argmax(1) == y).double().mean()
    return F.cross_entropy(out, y), {"logits": out, "metrics": (accuracy,)}


def test_aux() -> None:
    model = built(CASES["cnn"]).eval()
    x, y = images(0)
    expected = model(x).detach()
    accuracy = (expected.argmax(1) == y).double().mean()
    step = gcfunc.train_step(model, logits_and_accuracy, gcfunc.sgd(0.1), has_aux=True)
    _, loss, aux = step(step.init(), x, y)
    torch.testing.assert_close(aux, {"logits": expected, "metrics": (accuracy,)})
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))
    assert not any(t.requires_grad for t in [loss, *pytree.tree_leaves(aux)])


def test_aux_of_micro_batches_is_stacked() -> None:
    model = built(CASES["cnn"]).eval()
    x, y = images(0)
    step = gcfunc.train_step(
        model, logits_and_accuracy, gcfunc.sgd(0.1), has_aux=True, accumulate=4
    )
    _, loss, aux = step(step.init(), x, y)
    expected = model(x).detach()
    torch.testing.assert_close(aux["logits"], expected.view(4, 2, 3))
    accuracies = (expected.argmax(1) == y).double().view(4, 2).mean(1)
    torch.testing.assert_close(aux["metrics"], (accuracies,))
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))


def test_dropout_is_drawn_anew() -> None:
    model = ConvNet(dropout=0.5).double()
    step = gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1))
    train, batch = step.init(), images(0)
    torch.manual_seed(0)
    losses = [step(train, *batch)[1].item() for _ in range(3)]
    assert len({*losses}) == 3
    torch.manual_seed(0)
    assert [step(train, *batch)[1].item() for _ in range(3)] == losses
    model.eval()
    assert len({step(train, *batch)[1].item() for _ in range(3)}) == 1


def test_eval_mode_leaves_buffers_alone() -> None:
    model = built(CASES["cnn"]).eval()
    step = gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1))
    train = step.init()
    stepped, _ = step(train, *images(0))
    assert largest_difference(stepped.buffers, train.buffers) == 0
    model.train()
    stepped, _ = step(train, *images(0))
    assert stepped.buffers["norm.num_batches_tracked"] == 1
    assert largest_difference(stepped.buffers, train.buffers) > 0.01


def test_a_buffer_that_the_forward_replaces() -> None:
    class Counting(nn.Linear):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + x.detach().sum(0)
            return super().forward(x)

    model = Counting()
    seen = model.seen
    step = gcfunc.train_step(model, torch.mean, gcfunc.sgd(0.1), accumulate=2)
    train = step.init()
    for t in range(1, 3):
        train, _ = step(train, torch.ones(4, 3))
        assert train.buffers["seen"].tolist() == [4.0 * t] * 3
    assert model.seen is seen
    assert seen.tolist() == [0.0] * 3


def test_frozen_parameters_are_constants() -> None:
    model = built(CASES["cnn"])
    model.get_submodule("conv").requires_grad_(False)
    expected = copy.deepcopy(model)
    opt = gcfunc.adamw(0.1)
    step = gcfunc.train_step(model, F.cross_entropy, opt)
    train = step.init()
    assert [*train.params] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert "conv.weight" not in train.state.slots["exp_avg"]
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], 0.1)
    for t in range(STEPS):
        train, _ = step(train, *images(t))
        ordinary(expected, optimizer, F.cross_entropy, *images(t))
    trained = {name: t for name, t in named(expected).items() if "conv" not in name}
    assert largest_difference(train.params | train.buffers, trained) < EXACT


def test_what_is_trained_is_decided_once() -> None:
    """Freezing and thawing the skeleton afterwards changes nothing, and records no history."""
    model = built(CASES["cnn"])
    model.get_submodule("conv").requires_grad_(False)
    step = gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1))
    train = step.init()
    expected, _ = step(train, *images(0))
    for thawed in (True, False):
        model.requires_grad_(thawed)
        assert [*step.init().params] == [*train.params]
        stepped, loss = step(train, *images(0))
        assert largest_difference(stepped.params, expected.params) == 0
        assert not any(t.requires_grad for t in [loss, *pytree.tree_leaves(stepped)])


def test_an_unused_parameter_is_decayed_and_coasts() -> None:
    """Autograd gives it None, and torch.optim leaves it alone."""

    class Half(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1)
            self.unused = nn.Parameter(torch.ones(3))

    x, model = torch.ones(1, 2), Half()
    step = gcfunc.train_step(model, torch.sum, gcfunc.sgd(0.1, weight_decay=0.5))
    stepped, _ = step(step.init(), x)
    torch.testing.assert_close(stepped.params["unused"], torch.full((3,), 0.95))

    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5).step()
    assert model.unused.tolist() == [1.0] * 3


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, *, scale: Any = 1.0, labels: Tensor | None = None) -> Any:
        out = super().forward(x) * scale
        if labels is None:
            return out
        return {"loss": F.mse_loss(out, labels), "logits": out}


def test_ways_to_give_inputs() -> None:
    torch.manual_seed(0)
    model = TwoInputs(3, 2)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    given: list[tuple[Any, Loss, tuple[Tensor, ...]]] = [
        (x, F.mse_loss, (y,)),
        ((x,), F.mse_loss, (y,)),
        ({"x": x}, F.mse_loss, (y,)),
        ({"x": x, "labels": y}, lambda out: out["loss"], ()),
        (collections.UserDict({"x": x, "labels": y, "scale": 1.0}), lambda out: out["loss"], ()),
    ]
    for accumulate in (1, 2):
        steps = [
            gcfunc.train_step(model, loss_fn, gcfunc.sgd(0.1), accumulate=accumulate)
            for _, loss_fn, _ in given
        ]
        trains = [
            step(step.init(), inputs, *targets)[0]
            for step, (inputs, _, targets) in zip(steps, given, strict=True)
        ]
        for train in trains[1:]:
            assert largest_difference(train.params, trains[0].params) == 0
        assert largest_difference(trains[0].params, steps[0].init().params) > 1e-3


class Pair(NamedTuple):
    x: Tensor
    gate: Tensor


def test_a_named_tuple_is_one_input() -> None:
    class Gated(nn.Linear):
        def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
            return super().forward(pair.x) * pair.gate

    step = gcfunc.train_step(Gated(2, 4), torch.mean, gcfunc.sgd(0.1), accumulate=2)
    train = step.init()
    stepped, _ = step(train, Pair(torch.ones(4, 2), torch.ones(4, 1)))
    assert largest_difference(stepped.params, train.params) > 0


def test_a_hugging_face_model() -> None:
    from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).double().eval()
    expected = copy.deepcopy(model)
    ids = torch.randint(11, (4, 6))
    batch = BatchEncoding({"input_ids": ids, "labels": ids})
    step = gcfunc.train_step(
        model, lambda out: (out.loss, out.logits), gcfunc.sgd(0.1), has_aux=True, accumulate=2
    )
    train, loss, logits = step(step.init(), batch)
    assert logits.shape == (2, 2, 6, 11)
    output = expected(**batch)
    output.loss.backward()
    torch.optim.SGD(expected.parameters(), 0.1).step()
    assert difference(train, expected) < EXACT
    torch.testing.assert_close(loss, output.loss.detach())


def test_the_loss_sees_the_parameters_of_the_step() -> None:
    """A penalty that reads them from the model."""
    model = nn.Linear(3, 1)

    def loss_fn(out: Tensor) -> Tensor:
        return 0.5 * model.weight.square().sum() + 0.0 * out.sum()

    step = gcfunc.train_step(model, loss_fn, gcfunc.sgd(0.5))
    train = step.init()
    for t in range(1, 3):
        train, _ = step(train, torch.ones(2, 3))
        torch.testing.assert_close(train.params["weight"], 0.5**t * model.weight.detach())


def storages(tree: Any) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in pytree.tree_leaves(tree)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_purity(accumulate: int, training: bool) -> None:
    model = ConvNet().double().train(training)
    model.head.requires_grad_(False)

    def loss_fn(out: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        own = (model.head.bias, model.norm.running_mean, model.conv.weight)
        return F.cross_entropy(out, y), (out, out[:1], y, own)

    opt = gcfunc.adamw(0.1, gc="gc")
    step = gcfunc.train_step(model, loss_fn, opt, has_aux=True, accumulate=accumulate, clip_norm=1)
    train, batch = step.init(), images(0)
    before = named(model)
    objects = [(t, t._version) for t in [*model.parameters(), *model.buffers()]]
    given = pytree.tree_leaves((train, batch))
    copies = [t.clone() for t in given]
    results = step(train, *batch)
    assert all(map(torch.equal, given, copies))
    assert largest_difference(named(model), before) == 0
    own = [*model.parameters(), *model.buffers()]
    assert all(t is o and t._version == v for t, (o, v) in zip(own, objects, strict=True))
    assert all(p.grad is None for p in model.parameters())
    sharing = storages(results)
    assert len({*sharing}) == len(sharing)
    assert not {*sharing} & {*storages((train, batch, own))}
    assert not {*storages(train)} & {*storages(own)}


def test_an_ensemble() -> None:
    """Members with buffers and learning rates of their own, under vmap."""
    case = CASES["cnn"]
    opt = gcfunc.adamw(0.01, gc="gc")
    models = [built(case, seed=s) for s in range(3)]
    steps = [gcfunc.train_step(m, case.loss_fn, opt, clip_norm=0.1, accumulate=2) for m in models]
    trains = []
    for i, step in enumerate(steps):
        train = step.init()
        state = gcfunc.update_hyperparams(train.state, lr=0.01 * (i + 1))
        trains.append(train._replace(state=state))
    stacked = pytree.tree_map(lambda *ts: torch.stack(ts), *trains)
    together = torch.func.vmap(steps[0], in_dims=(0, None, None))
    for t in range(2):
        stacked, losses = together(stacked, *images(t))
        results = [step(train, *images(t)) for step, train in zip(steps, trains, strict=True)]
        trains = [train for train, _ in results]
        torch.testing.assert_close(losses, torch.stack([loss for _, loss in results]))
    for i, train in enumerate(trains):
        member = pytree.tree_map(lambda t, i=i: t[i], stacked)
        assert largest_difference(member.params, train.params) < EXACT
        assert largest_difference(member.buffers, train.buffers) < EXACT


def test_the_gradient_of_training() -> None:
    """With respect to the learning rate, through two steps, against finite differences."""
    case = CASES["tied"]
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    step = gcfunc.train_step(built(case), case.loss_fn, opt, clip_norm=0.1, accumulate=2)

    def final_loss(lr: Tensor) -> Tensor:
        train = step.init()
        hyperparams = train.state.hyperparams | {"lr": lr}
        train = train._replace(state=train.state._replace(hyperparams=hyperparams))
        for _ in range(2):
            train, _ = step(train, *case.batch(0))
        return step(train, *case.batch(0))[1]

    lr = torch.tensor(0.1, dtype=torch.float64)
    forward = torch.func.grad(final_loss)(lr)
    finite = (final_loss(lr + 1e-5) - final_loss(lr - 1e-5)) / 2e-5
    assert abs(forward) > 1e-4
    torch.testing.assert_close(forward, finite, rtol=1e-6, atol=0.0)


def test_under_no_grad() -> None:
    case = CASES["cnn"]
    step = gcfunc.train_step(built(case), case.loss_fn, gcfunc.sgd(0.1))
    expected, _ = step(step.init(), *case.batch(0))
    with torch.no_grad():
        train, _ = step(step.init(), *case.batch(0))
    assert largest_difference(train.params, expected.params) == 0


def test_training_goes_on_from_a_checkpoint() -> None:
    case = CASES["cnn"]
    opt = gcfunc.adamw(0.01, gc="gc")
    step = gcfunc.train_step(built(case), case.loss_fn, opt)
    train, _ = step(step.init(), *case.batch(0))
    file = io.BytesIO()
    torch.save([train.params, train.buffers, gcfunc.state_dict(train.state)], file)
    file.seek(0)

    model = built(case, seed=1)
    elsewhere = gcfunc.train_step(model, case.loss_fn, opt)
    params, buffers, state = torch.load(file, weights_only=True)
    fresh = elsewhere.init().state
    resumed = TrainState(params, buffers, gcfunc.load_state_dict(fresh, state))
    train, _ = step(train, *case.batch(1))
    resumed, _ = elsewhere(resumed, *case.batch(1))
    assert all(map(torch.equal, pytree.tree_leaves(resumed), pytree.tree_leaves(train)))
    model.load_state_dict(train.params | train.buffers)
    assert difference(train, model) == 0


COMPILED: dict[str, tuple[Case, Callable[[Any], Optimizer], dict[str, Any]]] = {
    "cnn": (CASES["cnn"], CENTRALIZED["sgd"], {"clip_norm": 0.1, "accumulate": 2}),
    "tied": (CASES["tied"], CENTRALIZED["ranger"], {"autocast": torch.bfloat16}),
    "transformer": (CASES["transformer"], CENTRALIZED["adamw"], {}),
}


def addresses(train: TrainState) -> list[int]:
    return [t.data_ptr() for t in pytree.tree_leaves(train)]


def assert_one_graph(
    case: Case, step: Any, compiled: Any, dtype: torch.dtype, donated: bool = False
) -> None:
    """Compiled once; then other batches and learning rates, each step compared with eager."""
    tolerance = EXACT if dtype is torch.float64 else 1e-3
    train, other = step.init(), step.init()
    for t in range(4):
        given, before = train, addresses(train)
        with torch.compiler.set_stance("fail_on_recompile" if t else "default"):
            train, *results = compiled(train, *case.batch(t, dtype))
        assert (train is given) is donated
        assert (addresses(train) == before) is donated
        other, *expected = step(other, *case.batch(t, dtype))
        torch.testing.assert_close(
            (train, results), (other, expected), rtol=tolerance, atol=tolerance
        )
        state = gcfunc.update_hyperparams(train.state, lr=0.1 / (t + 2))
        train, other = train._replace(state=state), other._replace(state=state)
        other = pytree.tree_map(torch.clone, other)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["torch.compile", "donated"])
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph(name: str, how: str) -> None:
    case, opt, options = COMPILED[name]
    dtype = torch.float32 if "autocast" in options else torch.float64
    step = gcfunc.train_step(built(case, dtype), case.loss_fn, opt("gc"), **options)
    if how == "donated":
        assert_one_graph(case, step, gcfunc.compile(step, backend="aot_eager"), dtype, donated=True)
    else:
        compiled = torch.compile(step.step, fullgraph=True, backend="aot_eager")
        assert_one_graph(case, step, compiled, dtype)


def bystanders(model: nn.Module) -> Loss:
    """A loss whose aux holds the very tensors that the step is about to write."""

    def loss_fn(out: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        return F.cross_entropy(out, y), {"own": own, "out": out, "head": out[:2], "y": y}

    return loss_fn


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("donate", [True, False])
def test_one_graph_on_inductor(donate: bool) -> None:
    """In place too, where Inductor crashes on some forms and loses the writes of others."""
    case, model = CASES["cnn"], built(CASES["cnn"])
    opt = gcfunc.sgd(0.1, 0.9, weight_decay=0.01, gc="gc")
    step = gcfunc.train_step(model, bystanders(model), opt, has_aux=True, clip_norm=0.1)
    compiled = gcfunc.compile(step, donate=donate)
    assert_one_graph(case, step, compiled, torch.float64, donated=donate)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_dropout_is_drawn_anew(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5))
    step = gcfunc.train_step(model, torch.mean, gcfunc.sgd(0.0))
    compiled = gcfunc.compile(step, backend=backend)
    train, x = compiled.init(), torch.ones(2, 3)
    losses = [compiled(train, x)[1].item() for _ in range(3)]
    assert len({*losses}) == 3
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("donate", [True, False])
def test_what_a_compiled_step_leaves_alone(donate: bool) -> None:
    """The module and its objects, the batch, and the train state unless donated."""
    model = ConvNet().double()
    model.conv.requires_grad_(False)
    step = gcfunc.train_step(model, bystanders(model), gcfunc.adamw(0.1, gc="gc"), has_aux=True)
    compiled = gcfunc.compile(step, donate=donate, backend="aot_eager")
    train = compiled.init()
    own = [*model.parameters(), *model.buffers()]
    given = [*own, *images(0), *([] if donate else pytree.tree_leaves(train))]
    copies = [t.detach().clone() for t in given]
    x, y = given[len(own) : len(own) + 2]
    new, loss, aux = compiled(train, x, y)
    assert all(map(torch.equal, given, copies))
    assert all(map(operator.is_, own, [*model.parameters(), *model.buffers()]))
    results = storages((new, loss, aux))
    assert len({*results}) == len(results)
    assert not {*results} & {*storages(given)}

    model.conv.weight.data.zero_()  # constants are read anew
    _, expected, _ = step(train, x, y)
    torch.testing.assert_close(compiled(train, x, y)[1], expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_train_states_take_turns() -> None:
    case = CASES["cnn"]
    step = gcfunc.train_step(built(case), case.loss_fn, gcfunc.sgd(0.1, 0.9, gc="gc"))
    compiled = gcfunc.compile(step, backend="aot_eager")
    own, pure = [step.init(), step.init()], [step.init(), step.init()]
    for t in range(4):
        compiled(own[t % 2], *case.batch(t))
        pure[t % 2], _ = step(pure[t % 2], *case.batch(t))
    torch.testing.assert_close(own, pure)
    assert largest_difference(own[0].params, own[1].params) > 1e-3
    assert counters["stats"]["unique_graphs"] == 1
    # A state in which only the buffers are others.
    buffers = {name: b.clone() for name, b in own[0].buffers.items()}
    before = copy.deepcopy(own[0].buffers)
    compiled(own[0]._replace(buffers=buffers), *case.batch(0))
    assert largest_difference(own[0].buffers, before) == 0
    assert largest_difference(buffers, before) > 1e-3


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_follows_the_mode_of_the_model() -> None:
    model = ConvNet(dropout=0.5).double()
    compiled = gcfunc.compile(
        gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.0)), backend="aot_eager"
    )
    train = compiled.init()
    compiled(train, *images(0))
    assert train.buffers["norm.num_batches_tracked"] == 1
    model.eval()
    losses = {compiled(train, *images(0))[1].item() for _ in range(2)}
    assert len(losses) == 1
    assert train.buffers["norm.num_batches_tracked"] == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_memory_that_is_shared_is_refused() -> None:
    model = ConvNet()
    compiled = gcfunc.compile(
        gcfunc.train_step(model, F.cross_entropy, gcfunc.sgd(0.1)), backend="aot_eager"
    )
    train = compiled.init()
    train.buffers["norm.running_mean"] = train.params["norm.bias"]
    with pytest.raises(ValueError, match="may share memory"):
        compiled(train, *images(0, torch.float32))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("steps", [0, 1])
def test_bad_calls_of_a_donated_step(steps: int) -> None:
    """The same words as without compilation, and nothing changed."""
    step = gcfunc.train_step(LINEAR, F.mse_loss, gcfunc.sgd(0.1, 0.9), accumulate=2)
    compiled = gcfunc.compile(step, backend="aot_eager")
    train = compiled.init()
    for _ in range(steps):
        compiled(train, X, Y)
    before = pytree.tree_map(torch.clone, train)
    stateless = train._replace(state=None)  # type: ignore[arg-type]
    bad: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, "does not divide 'inputs' with dimension 0 of size 3", (train, X[:3], Y)),
        (TypeError, "train must come from init", (train.params, X, Y)),
        (TypeError, "state must come from init", (stateless, X, Y)),
        (ValueError, "missing 'bias'", (train._replace(params={"weight": X}), X, Y)),
    ]
    for error, message, arguments in bad:
        with pytest.raises(error, match=re.escape(message)):
            compiled(*arguments)
    torch.testing.assert_close(train, before, rtol=0.0, atol=0.0)
    compiled(train, X, Y)
    assert largest_difference(train.params, before.params) > 1e-3


@pytest.mark.usefixtures("fresh_compiler")
def test_a_buffer_that_outgrows_its_memory() -> None:
    class Growing(nn.Linear):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, self.seen])
            return super().forward(x)

    step = gcfunc.train_step(Growing(), torch.mean, gcfunc.sgd(0.1))
    assert step(step.init(), X)[0].buffers["seen"].shape == (2,)
    compiled = gcfunc.compile(step, backend="aot_eager")
    with pytest.raises(Exception, match="the forward gave buffer 'seen' another shape"):
        compiled(compiled.init(), X)


LINEAR = nn.Linear(3, 2)
OPT = gcfunc.sgd(0.1)
BAD_ARGUMENTS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no module": (TypeError, "model must be a torch.nn.Module, got function", {"model": F.relu}),
    "nothing to train": (ValueError, "no parameter that requires grad", {"model": nn.ReLU()}),
    "frozen": (
        ValueError,
        "no parameter that requires grad",
        {"model": nn.Linear(3, 2).requires_grad_(False)},
    ),
    "no loss": (TypeError, "loss_fn must be a function", {"loss_fn": "mse"}),
    "loss with parameters": (ValueError, "part of the model", {"loss_fn": nn.Linear(2, 1)}),
    "torch optimizer": (TypeError, "opt must be an optimizer", {"opt": torch.optim.SGD}),
    "compiled optimizer": (TypeError, "not yet compiled", {"opt": gcfunc.compile(OPT)}),
    "no clipping at 0": (ValueError, "clip_norm must be a finite number > 0", {"clip_norm": 0}),
    "negative clipping": (ValueError, "> 0, got -1", {"clip_norm": -1.0}),
    "nan": (ValueError, "> 0, got nan", {"clip_norm": float("nan")}),
    "infinity": (ValueError, "> 0, got inf", {"clip_norm": float("inf")}),
    "clipping on": (TypeError, "clip_norm must be None or a number", {"clip_norm": True}),
    "clip text": (TypeError, "clip_norm must be None or a number", {"clip_norm": "1"}),
    "accumulate 0": (ValueError, "accumulate must be at least 1, got 0", {"accumulate": 0}),
    "accumulate float": (TypeError, "accumulate must be an integer", {"accumulate": 2.0}),
    "accumulate on": (TypeError, "accumulate must be an integer", {"accumulate": True}),
    "autocast on": (TypeError, "autocast must be None, torch.bfloat16", {"autocast": True}),
    "autocast wide": (TypeError, "got torch.float64", {"autocast": torch.float64}),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments(bad: str) -> None:
    error, message, given = BAD_ARGUMENTS[bad]
    arguments: dict[str, Any] = {"model": LINEAR, "loss_fn": F.mse_loss, "opt": OPT} | given
    with pytest.raises(error, match=re.escape(message)):
        gcfunc.train_step(**arguments)


def test_lazy_models_run_once_first() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules", UserWarning)
        model = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="'weight' has no shape yet"):
        gcfunc.train_step(model, F.mse_loss, OPT)


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
def test_wrapped_models_are_refused() -> None:
    """What they do in backward would silently not happen."""
    inner = nn.Sequential(nn.Linear(3, 2))
    fully_shard(inner[0])
    for model in (nn.parallel.DistributedDataParallel(nn.Linear(3, 2)), inner):
        with pytest.raises(TypeError, match=r"torch\.func skips what (Distrib|FSDPModule)"):
            gcfunc.train_step(model, F.mse_loss, OPT)


def test_hooks_are_refused() -> None:
    """Gradient centralization by hooks, for one, would silently not happen."""
    model = nn.Linear(3, 2)
    handle = model.bias.register_hook(torch.neg)
    with pytest.raises(ValueError, match="'bias' has a hook"):
        gcfunc.train_step(model, F.mse_loss, OPT)
    handle.remove()
    gcfunc.train_step(model, F.mse_loss, OPT)


def test_a_model_that_was_changed_is_refused() -> None:
    """As by ``to("meta")``, which unties tied weights."""
    model = TiedMLP()
    step = gcfunc.train_step(model, F.mse_loss, OPT)
    train = step.init()
    model.out.weight = nn.Parameter(model.out.weight.detach().clone())
    with pytest.raises(ValueError, match="the model does not match what train_step was given; une"):
        step(train, *vectors(0, torch.float32))


X, Y = torch.ones(4, 3), torch.ones(4, 2)
TRAIN = gcfunc.train_step(LINEAR, F.mse_loss, OPT).init()


def mean(out: Tensor, *targets: Any) -> Tensor:
    return out.mean()


BAD_CALLS: dict[str, tuple[type[Exception], str, dict[str, Any], tuple[Any, ...]]] = {
    "loss per sample": (
        ValueError,
        "loss_fn must return a 0-d loss, got shape (4,); take its mean",
        {"loss_fn": lambda out: out.mean(1)},
        (TRAIN, X),
    ),
    "integer loss": (
        TypeError,
        "floating-point loss, got torch.int64",
        {"loss_fn": lambda out: out.argmax()},
        (TRAIN, X),
    ),
    "number": (
        TypeError,
        "must return a tensor, got float",
        {"loss_fn": lambda out: 1.0},
        (TRAIN, X),
    ),
    "nothing": (
        TypeError,
        "must return a tensor, got NoneType",
        {"loss_fn": lambda out: None},
        (TRAIN, X),
    ),
    "aux unannounced": (
        TypeError,
        "must return a tensor, got tuple; for (loss, aux) set has_aux=True",
        {"loss_fn": lambda out: (out.mean(), out)},
        (TRAIN, X),
    ),
    "aux missing": (
        TypeError,
        "with has_aux=True loss_fn must return (loss, aux), got Tensor",
        {"loss_fn": mean, "has_aux": True},
        (TRAIN, X),
    ),
    "aux of numbers": (
        TypeError,
        "aux must be a pytree of tensors, got a float in it",
        {"loss_fn": lambda out: (out.mean(), {"accuracy": 0.5}), "has_aux": True},
        (TRAIN, X),
    ),
    "batch not divisible": (
        ValueError,
        "accumulate=3 does not divide 'inputs' with dimension 0 of size 4",
        {"loss_fn": mean, "accumulate": 3},
        (TRAIN, X),
    ),
    "target not divisible": (
        ValueError,
        "accumulate=2 does not divide 'targets.0.weights' with dimension 0 of size 3",
        {"loss_fn": mean, "accumulate": 2},
        (TRAIN, X, {"weights": torch.ones(3)}),
    ),
    "empty batch": (
        ValueError,
        "does not divide 'inputs' with dimension 0 of size 0",
        {"loss_fn": mean, "accumulate": 2},
        (TRAIN, X[:0]),
    ),
    "0-d": (
        ValueError,
        "accumulate=2 cannot cut up 'targets.1', a 0-d tensor",
        {"loss_fn": mean, "accumulate": 2},
        (TRAIN, X, Y, torch.tensor(0.5)),
    ),
    "unknown container": (
        TypeError,
        "accumulate=2 cannot cut up 'inputs' of type object",
        {"loss_fn": mean, "accumulate": 2},
        (TRAIN, object()),
    ),
    "params for train": (
        TypeError,
        "train must come from init or step, got dict",
        {"loss_fn": mean},
        (TRAIN.params, X),
    ),
    "another model's params": (
        ValueError,
        "train.params does not match the model's trained ones; missing 'bias'",
        {"loss_fn": mean},
        (TRAIN._replace(params={"weight": X}), X),
    ),
    "another model's buffers": (
        ValueError,
        "train.buffers does not match the model's; unexpected 'mean'",
        {"loss_fn": mean},
        (TRAIN._replace(buffers={"mean": X}), X),
    ),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls(bad: str) -> None:
    error, message, options, arguments = BAD_CALLS[bad]
    step = gcfunc.train_step(LINEAR, opt=OPT, **options)
    with pytest.raises(error, match=re.escape(message)):
        step(*arguments)


def test_what_the_optimizer_refuses() -> None:
    """Its own errors, from ``init`` and from ``step``."""
    bias = nn.Linear(3, 2)
    bias.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="selects none of 1 tensors"):
        gcfunc.train_step(bias, F.mse_loss, gcfunc.sgd(0.1, gc="gc")).init()
    step = gcfunc.train_step(LINEAR, F.mse_loss, gcfunc.sgd(0.1, 0.9))
    with pytest.raises(ValueError, match=r"state.hyperparams does not match"):
        step(TRAIN, X, Y)


def test_repr() -> None:
    step = gcfunc.train_step(LINEAR, F.mse_loss, OPT, has_aux=True, clip_norm=1.0)
    assert repr(step) == (
        "train_step(Linear, sgd(lr=0.1, weight_decay=0.0), has_aux=True, clip_norm=1.0)"
    )
    assert repr(gcfunc.compile(step)) == f"compile({step!r})"


@pytest.mark.usefixtures("fresh_compiler")
def test_donated_params_in_another_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    pure = gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(0.1, gc="gc"))
    donated = gcfunc.compile(pure, backend="aot_eager")
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    donated(donated.init(), x, y)
    first = pure.init()
    params = dict(reversed(first.params.items()))
    turned = first._replace(params=params, state=pure.opt.init(params))
    expected, loss = pure(turned, x, y)
    actual, own_loss = donated(turned, x, y)
    torch.testing.assert_close(own_loss, loss)
    torch.testing.assert_close(actual.params, expected.params)


@pytest.mark.usefixtures("fresh_compiler")
def test_donated_buffers_of_another_shape() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)
            self.register_buffer("scale", torch.arange(6.0).view(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * self.get_buffer("scale").sum(1)[:2]
            return out

    pure = gcfunc.train_step(Scaled(), nn.functional.mse_loss, gcfunc.sgd(0.1))
    donated = gcfunc.compile(pure, backend="aot_eager")
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    for shape in ((2, 3), (3, 2)):
        train = pure.init()._replace(buffers={"scale": torch.arange(6.0).view(shape)})
        _, loss = pure(train, x, y)
        torch.testing.assert_close(donated(train, x, y)[1], loss)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused(when: str, kind: str) -> None:
    model = nn.Linear(2, 2)
    if when == "before":
        getattr(model.weight, kind)(lambda g: None)
        with pytest.raises(ValueError, match="'weight' has a hook"):
            gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(0.1))
        return
    step = gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(0.1))
    getattr(model.weight, kind)(lambda g: None)
    with pytest.raises(ValueError, match="'weight' has a hook"):
        step(step.init(), torch.ones(1, 2), torch.ones(1, 2))


def test_hooks_on_modules_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    with pytest.raises(ValueError, match="has a backward hook"):
        gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(0.1))


@pytest.mark.usefixtures("fresh_compiler")
def test_donated_steps_check_hyperparameters_every_time() -> None:
    donated = gcfunc.compile(
        gcfunc.train_step(nn.Linear(2, 2), nn.functional.mse_loss, gcfunc.sgd(0.1)),
        backend="aot_eager",
    )
    train, _ = donated(donated.init(), torch.ones(1, 2), torch.ones(1, 2))
    wrong: Any = train.state.hyperparams | {"lr": 0.05}
    train = train._replace(state=train.state._replace(hyperparams=wrong))
    with pytest.raises(TypeError, match="'lr' must be a 0-d tensor"):
        donated(train, torch.ones(1, 2), torch.ones(1, 2))


def test_dtensors_are_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(4, 6)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(TypeError, match="'weight' is a DTensor"):
            gcfunc.train_step(model, F.mse_loss, gcfunc.sgd(0.1))
    finally:
        torch.distributed.destroy_process_group()
