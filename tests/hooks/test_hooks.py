"""Hook mode on one process: gradients arrive centralized, whatever computes and takes them."""

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gcfunc
from gcfunc import Units
from gcfunc.centralize import Where
from gcfunc.hooks import centralize_backward, ddp_comm_hook, register_ddp
from tests.cases import largest_difference
from tests.distributed import gradients, require_same

F64 = torch.float64


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, for what asks for a group."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    """With a mean that GC has something to subtract."""
    return (0.5 + torch.randn(shape, dtype=F64)).to(dtype)


def mlp(dtype: torch.dtype = F64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def loss_of(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Each output counts differently, so that gradients of no two units are alike."""
    out = model(*inputs)
    out = out if isinstance(out, Tensor) else out[0]
    weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (out * weights).square().mean()


def hooks_on(model: nn.Module) -> list[Any]:
    """Every hook that parameters or DDP have."""
    found = [*getattr(model, "_comm_hooks", [])]
    for p in model.parameters():
        found += (p._backward_hooks or {}).values()
        found += (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
    return found


Run = Callable[[nn.Module], Any]


def require_centralized(model: nn.Module, run: Run, where: Where = "gc") -> None:
    """What ``run`` leaves in ``.grad``, of the hooked model and of a plain copy."""
    plain = copy.deepcopy(model)
    run(plain)
    with centralize_backward(model, where) as handle:
        run(model)
        handle.check(model)
    have, without = gradients(model), gradients(plain)
    present = [name for name in handle.names if name in without]
    whole = dict(plain.named_parameters()) | without  # a mask has to match them all
    want = gcfunc.centralize(whole, where)
    require_same(have, {name: want[name] for name in without})
    require_different(without, have, present)


def require_different(
    without: Mapping[str, Tensor], have: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """GC made a difference to these, and to no others."""
    assert names
    changed = [n for n, g in without.items() if float((g - have[n]).abs().max()) > 1e-5]
    assert changed == [*names]


# Values


class Tied(nn.Module):
    """One weight under two names, and used a third time without one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.b(torch.tanh(self.a(x)))), self.a.weight.t())


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


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    # What comes from a fresh LayerNorm has no mean, and then no gradient of linear1 has.
    nn.init.normal_(layer.norm1.weight)
    return layer


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (5, 4)),
    "CNN": (cnn, (5, 2, 5, 5)),
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
    "tied": (Tied, (5, 3)),
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
    "gc": ("gc", ("0.weight", "4.weight")),
    "gcc": ("gcc", ("0.weight",)),
    "predicate": (lambda name, p: name == "4.weight", ("4.weight",)),
    "predicate with units": (lambda name, p: Units(dim=1), ("0.weight", "4.weight")),
    "mask": ({n: n == "0.weight" for n, _ in cnn().named_parameters()}, ("0.weight",)),
}


@pytest.mark.parametrize("where", WHERES)
def test_where(where: str) -> None:
    given, names = WHERES[where]
    model, x = cnn().double(), random(5, 2, 5, 5)
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
    model, x = cnn().to(dtype), random(5, 2, 5, 5, dtype=dtype)
    require_centralized(model, lambda m: loss_of(m, x).backward())
    assert {g.dtype for g in gradients(model).values()} == {dtype}


def test_embeddings() -> None:
    words = torch.tensor([[0, 3, 3], [6, 0, 1]])
    require_centralized(Words().double(), lambda m: loss_of(m, words).backward())


# How gradients are computed


X = torch.randn(3, 5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def accumulated(model: nn.Module) -> None:
    for x in X:
        loss_of(model, x).backward()


def zeroed(model: nn.Module, set_to_none: bool) -> None:
    for x in X:
        model.zero_grad(set_to_none)
        loss_of(model, x).backward()


def retained(model: nn.Module) -> None:
    loss = loss_of(model, X[0])
    loss.backward(retain_graph=True)
    loss.backward()


def asked_for(model: nn.Module) -> None:
    """By torch.autograd.grad, which leaves ``.grad`` alone."""
    params = [*model.parameters()]
    grads = torch.autograd.grad(loss_of(model, X[0]), params)
    assert all(p.grad is None for p in params)
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def autocast(model: nn.Module) -> None:
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, X[0].float())
    loss.backward()


def checkpointed(model: nn.Module, use_reentrant: bool) -> None:
    x = X[0].clone().requires_grad_()  # the reentrant kind wants that
    loss_of(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x).backward()  # type: ignore[arg-type]


def frozen_for_a_while(model: nn.Module) -> None:
    weight = model.get_parameter("0.weight")
    weight.requires_grad_(False)
    loss_of(model, X[0]).backward()
    assert weight.grad is None
    weight.requires_grad_(True)
    loss_of(model, X[1]).backward()


def only_inputs_of(model: nn.Module) -> None:
    """A backward pass for some of the parameters."""
    loss_of(model, X[0]).backward(inputs=[model.get_parameter("2.weight")])


def stepped(model: nn.Module) -> None:
    """In-place changes of a parameter leave its hooks alone."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for x in X:
        loss_of(model, x).backward()
        optimizer.step()


RUNS: dict[str, Run] = {
    "accumulated": accumulated,
    "zeroed to None": partial(zeroed, set_to_none=True),
    "zeroed in place": partial(zeroed, set_to_none=False),
    "retained graph": retained,
    "autograd.grad": asked_for,
    "autocast": autocast,
    "checkpointed": partial(checkpointed, use_reentrant=False),
    "checkpointed, reentrant": partial(checkpointed, use_reentrant=True),
    "frozen for a while": frozen_for_a_while,
    "inputs": only_inputs_of,
    "in-place steps": stepped,
}


@pytest.mark.parametrize("run", RUNS)
def test_ways_to_compute_gradients(run: str) -> None:
    require_centralized(mlp(), RUNS[run])


def test_frozen_when_registered() -> None:
    model, plain = mlp().requires_grad_(False), mlp()
    plain.load_state_dict(model.state_dict())
    handle = centralize_backward(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert handle.names == ("0.weight", "2.weight")
    model.requires_grad_(True)
    for m in (model, plain):
        loss_of(m, X[0]).backward()
    require_same(gradients(model), gcfunc.centralize(gradients(plain)))
    require_different(gradients(plain), gradients(model), handle.names)


def test_gradient_penalty() -> None:
    """Second derivatives go through the projection, and arrive projected."""

    def penalty(model: nn.Module, project: Callable[[Any], Any]) -> dict[str, Tensor]:
        names, params = zip(*model.named_parameters(), strict=True)
        loss = loss_of(model, X[0])
        first = torch.autograd.grad(loss, params, create_graph=True)
        grads = project(dict(zip(names, first, strict=True)))
        total = loss + sum(g.square().sum() for g in grads.values())
        return project(dict(zip(names, torch.autograd.grad(total, params), strict=True)))

    def as_it_is(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return grads

    model = mlp()
    want, without = penalty(model, gcfunc.centralize), penalty(model, as_it_is)
    centralize_backward(model)
    have = penalty(model, as_it_is)
    require_same(have, want)
    # Not what centralizing at the end alone would give.
    assert largest_difference(gcfunc.centralize(without), want) > 1e-3


# What comes after backward


def test_clipping_comes_after() -> None:
    model = mlp()
    plain, clipped_first = copy.deepcopy(model), copy.deepcopy(model)
    centralize_backward(model)
    for m in (model, plain, clipped_first):
        loss_of(m, X[0]).backward()
    for name, g in gcfunc.centralize(gradients(plain)).items():
        plain.get_parameter(name).grad = g
    norms = [
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (model, plain, clipped_first)
    ]
    assert abs(norms[0] - norms[1]) < 1e-12
    assert norms[2] - norms[0] > 1e-3
    require_same(gradients(model), gradients(plain))
    assert largest_difference(gradients(model), gcfunc.centralize(gradients(clipped_first))) > 1e-6


def test_grad_scaler_skips_what_overflows() -> None:
    """GC of what is not finite is not finite, and GC of the rest knows no scale."""

    def train(model: nn.Module, project: Callable[[Any], Any]) -> tuple[dict[str, Tensor], float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step, x in enumerate(X):
            optimizer.zero_grad()
            before = [p.clone() for p in model.parameters()]
            scaler.scale(loss_of(model, x * (torch.inf if step == 1 else 1))).backward()
            scaler.unscale_(optimizer)
            for p, g in zip(
                model.parameters(), project([p.grad for p in model.parameters()]), strict=True
            ):
                p.grad = g
            scaler.step(optimizer)
            scaler.update()
            same = [*map(torch.equal, before, model.parameters())]
            assert all(same) if step == 1 else not any(same)
        return {n: p.detach() for n, p in model.named_parameters()}, scaler.get_scale()

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    plain, manual = copy.deepcopy(model), copy.deepcopy(model)
    want, scale = train(manual, gcfunc.centralize)
    without, _ = train(plain, lambda grads: grads)
    centralize_backward(model)
    have, have_scale = train(model, lambda grads: grads)
    assert have_scale == scale == 2.0**7
    require_same(have, want)
    assert largest_difference(have, without) > 1e-3


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Any]] = {
    "SGD": (partial(torch.optim.SGD, lr=0.1), gcfunc.sgd(0.1, gc="gc")),
    "momentum": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.3),
        gcfunc.sgd(0.1, 0.9, 0.3, gc="gc"),
    ),
    "nesterov": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        gcfunc.sgd(0.1, 0.9, nesterov=True, gc="gc"),
    ),
    "Adam": (partial(torch.optim.Adam, lr=0.01), gcfunc.adam(0.01, gc="gc")),
    "amsgrad": (
        partial(torch.optim.Adam, lr=0.01, amsgrad=True),
        gcfunc.adam(0.01, amsgrad=True, gc="gc"),
    ),
    "AdamW": (
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        gcfunc.adamw(0.01, weight_decay=0.1, gc="gc"),
    ),
    "Adagrad": (partial(torch.optim.Adagrad, lr=0.1), gcfunc.adagrad(0.1, gc="gc")),
    "RAdam": (partial(torch.optim.RAdam, lr=0.01), gcfunc.radam(0.01, gc="gc")),
    "RAdam, decoupled": (
        partial(torch.optim.RAdam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
        gcfunc.radam(0.01, weight_decay=0.1, decoupled_weight_decay=True, gc="gc"),
    ),
    "RMSprop": (partial(torch.optim.RMSprop, lr=0.01), None),
    "NAdam": (partial(torch.optim.NAdam, lr=0.01), None),
    "Adamax": (partial(torch.optim.Adamax, lr=0.01), None),
}
# With betas as they are RAdam rectifies from the sixth step on.
STEPS = 10


def train(
    model: nn.Module,
    build: Callable[..., torch.optim.Optimizer],
    change: Callable[[Any, Any], Any] = lambda params, grads: grads,
) -> dict[str, Tensor]:
    """The parameters after some steps, gradients changed after backward."""
    params = dict(model.named_parameters())
    optimizer = build(params.values())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, X[step % len(X)]).backward()
        for name, g in change(params, {n: p.grad for n, p in params.items()}).items():
            params[name].grad = g
        optimizer.step()
    return {n: p.detach() for n, p in params.items()}


def train_functionally(model: nn.Module, opt: gcfunc.Optimizer) -> dict[str, Tensor]:
    params = {n: p.detach() for n, p in model.named_parameters()}
    state = opt.init(params)
    for step in range(STEPS):
        x = X[step % len(X)]
        grads = torch.func.grad(
            lambda params, x: loss_of(lambda x: functional_call(model, params, x), x)  # type: ignore[arg-type]
        )(params, x)
        params, state = opt.step(params, grads, state)
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_functional_steps(name: str) -> None:
    build, functional = OPTIMIZERS[name]
    model = mlp()
    without = train(copy.deepcopy(model), build)
    want = train(copy.deepcopy(model), build, lambda params, grads: gcfunc.centralize(grads))
    if functional is not None:
        require_same(want, train_functionally(model, functional))
    centralize_backward(model)
    have = train(model, build)
    require_same(have, want)
    assert largest_difference(have, without) > 1e-3


COUPLED: dict[str, tuple[Callable[..., torch.optim.Optimizer], Any]] = {
    "SGD": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        gcfunc.sgd(0.1, 0.9, 0.0, 0.1, gc="gc"),
    ),
    "Adam": (partial(torch.optim.Adam, lr=0.01), gcfunc.adam(0.01, weight_decay=0.1, gc="gc")),
    "Adagrad": (
        partial(torch.optim.Adagrad, lr=0.1),
        gcfunc.adagrad(0.1, weight_decay=0.1, gc="gc"),
    ),
    "RAdam": (partial(torch.optim.RAdam, lr=0.01), gcfunc.radam(0.01, weight_decay=0.1, gc="gc")),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_decay_is_not_centralized(name: str) -> None:
    """As documented: a functional step centralizes it too."""
    build, functional = COUPLED[name]
    model = mlp()
    all_centralized = train_functionally(model, functional)
    want = train(
        copy.deepcopy(model),
        build,
        lambda params, grads: {
            n: g + 0.1 * params[n].detach() for n, g in gcfunc.centralize(grads).items()
        },
    )
    centralize_backward(model)
    have = train(model, partial(build, weight_decay=0.1))
    require_same(have, want)
    assert largest_difference(have, all_centralized) > 1e-4


# Sparse gradients


WORDS = torch.tensor([[0, 3, 3], [6, 0, 3]])
SPARSE: dict[str, Callable[[bool], nn.Module]] = {
    "Embedding": lambda sparse: nn.Embedding(7, 4, sparse=sparse),
    "padded": lambda sparse: nn.Embedding(7, 4, padding_idx=3, sparse=sparse),
    "EmbeddingBag, sum": lambda sparse: nn.EmbeddingBag(7, 4, mode="sum", sparse=sparse),
    "EmbeddingBag, mean": lambda sparse: nn.EmbeddingBag(7, 4, mode="mean", sparse=sparse),
}


def sparse_and_dense(name: str) -> tuple[nn.Module, nn.Module]:
    sparse, dense = (SPARSE[name](sparse).double() for sparse in (True, False))
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_rows_are_exact(name: str, passes: int) -> None:
    model, dense = sparse_and_dense(name)
    centralize_backward(model, sparse="rows")
    for m in (model, dense):
        for _ in range(passes):
            loss_of(m, WORDS).backward()
    have, want = gradients(model)["weight"], gradients(dense)["weight"]
    assert have.is_sparse
    require_same({"weight": have.to_dense()}, gcfunc.centralize({"weight": want}))
    assert (have.to_dense() - want).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch's Adagrad
def test_sparse_rows_take_steps() -> None:
    model, dense = sparse_and_dense("Embedding")
    plain = copy.deepcopy(dense)
    centralize_backward(model, sparse="rows")
    centralize_backward(dense)
    for m in (model, dense, plain):
        optimizer = torch.optim.Adagrad(m.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(m, WORDS).backward()
            optimizer.step()
    require_same(model.state_dict(), dense.state_dict())
    assert largest_difference(plain.state_dict(), dense.state_dict()) > 1e-3


def test_sparse_skipped() -> None:
    model, dense = sparse_and_dense("Embedding")
    centralize_backward(model, sparse="skip")
    for m in (model, dense):
        loss_of(m, WORDS).backward()
    assert gradients(model)["weight"].is_sparse
    require_same({"weight": gradients(model)["weight"].to_dense()}, gradients(dense))


class SparseGradient(torch.autograd.Function):
    """Of a parameter that looks as if its gradient were dense."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dims: int, coalesced: bool) -> Tensor:
        ctx.dims, ctx.coalesced = dims, coalesced
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = torch.arange(6.0).view(2, 3).square().to_sparse(ctx.dims)
        if not ctx.coalesced:
            grad = torch.cat([grad, grad]).coalesce()
            grad = torch.sparse_coo_tensor(grad.indices() % 2, grad.values(), (2, 3))
        return grad, None, None


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(2, 3))

    def forward(self, dims: int, coalesced: bool = True) -> Tensor:
        loss: Tensor = SparseGradient.apply(self.odd, dims, coalesced)
        return loss


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients_that_say_whether_rows_repeat(coalesced: bool) -> None:
    model = Odd()
    centralize_backward(model, sparse="rows")
    # By autograd.grad, as accumulation forgets it.
    (grad,) = torch.autograd.grad(model(1, coalesced), model.odd)
    want = torch.arange(6.0).view(2, 3).square() * (1 if coalesced else 2)
    assert grad.is_coalesced() == coalesced
    torch.testing.assert_close(grad.to_dense(), gcfunc.centralize(want))
    assert not torch.equal(grad.to_dense(), want)


SURPRISES: dict[str, tuple[dict[str, Any], int]] = {
    "not announced": ({}, 1),
    "not of rows": ({"sparse": "rows"}, 2),
    "other units": ({"sparse": "rows", "where": lambda name, p: Units(dim=1)}, 1),
}


@pytest.mark.parametrize("surprise", SURPRISES)
def test_sparse_gradients_that_cannot_be_centralized(surprise: str) -> None:
    options, dims = SURPRISES[surprise]
    model = Odd()
    centralize_backward(model, **options)
    with pytest.raises(RuntimeError, match=r"gradient of 'odd' is sparse.* or leave it out"):
        model(dims).backward()
    assert model.odd.grad is None


# The handle


def test_remove() -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    with centralize_backward(model) as handle:
        assert len(hooks_on(model)) == len(handle.names) == 2
        assert repr(handle) == "CentralizeHandle(0.weight, 2.weight)"
        held = hooks_on(model)
    handle.remove()
    assert not hooks_on(model)
    assert repr(handle) == "CentralizeHandle(0.weight, 2.weight, removed)"
    with pytest.raises(RuntimeError, match="removed"):
        handle.check(model)
    for m in (model, plain):
        loss_of(m, X[0]).backward()
    require_same(gradients(model), gradients(plain))
    assert largest_difference(gcfunc.centralize(gradients(model)), gradients(model)) > 1e-3
    # Even while somebody holds on to the hooks that were removed.
    assert held
    assert centralize_backward(model).names == BOTH


def test_remove_leaves_hooks_of_others() -> None:
    model = mlp()
    weight = model.get_parameter("0.weight")
    seen: list[Tensor] = []
    weight.register_hook(lambda g: seen.append(g))
    with centralize_backward(model):
        weight.register_hook(lambda g: seen.append(g))
        loss_of(model, X[0]).backward()
        # Hooks run in their order.
        torch.testing.assert_close(gcfunc.centralize(seen[0]), seen[1], rtol=0, atol=1e-12)
        assert not torch.equal(seen[0], seen[1])
    assert len(hooks_on(model)) == 2


def test_an_error_in_the_block_removes_too() -> None:
    model = mlp()
    with pytest.raises(ZeroDivisionError), centralize_backward(model):
        _ = 1 / 0
    assert not hooks_on(model)


def test_dropping_the_handle_keeps_the_hooks() -> None:
    model = mlp()
    centralize_backward(model)
    gc.collect()
    loss_of(model, X[0]).backward()
    assert max(gradients(model)["0.weight"].sum(1).abs()) < 1e-12


def of_one_process() -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    return model


def emptied(model: nn.Module) -> nn.Module:
    values = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(values)
    return model


def swapped(model: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(torch.float32).to(F64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=of_one_process())
    return model


def parallelized(model: nn.Module) -> nn.Module:
    return parallelize_module(
        model, of_one_process(), {"0": ColwiseParallel(), "2": ColwiseParallel()}
    )


def with_another_layer(model: nn.Module) -> nn.Module:
    model.set_submodule("0", nn.Linear(4, 3).double())
    return model


def reparametrized(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.get_submodule("2"))
    return model


def itself(model: nn.Module) -> nn.Module:
    return model


Replace = Callable[[nn.Module], nn.Module]
BOTH = ("0.weight", "2.weight")
REPLACED: dict[str, tuple[Replace, Replace, tuple[str, ...]]] = {
    "deepcopy": (itself, copy.deepcopy, BOTH),
    "pickle": (itself, through_pickle, BOTH),
    "torch.save": (itself, through_a_file, BOTH),
    "load_state_dict(assign=True)": (itself, assigned, BOTH),
    "to_empty": (itself, emptied, BOTH),
    "swap_tensors": (itself, swapped, BOTH),
    "fully_shard": (itself, sharded, BOTH),
    "parallelize_module": (itself, parallelized, BOTH),
    "DTensor.to(dtype)": (parallelized, lambda m: m.to(torch.float32).to(F64), BOTH),
    "submodule": (itself, with_another_layer, ("0.weight",)),
    "weight_norm": (itself, reparametrized, ("2.weight",)),
}


@pytest.mark.parametrize("case", REPLACED)
def test_check_tells_what_was_replaced(case: str) -> None:
    prepare, replace, lost = REPLACED[case]
    model = prepare(mlp())
    handle = centralize_backward(model)
    handle.check(model)
    model = replace(model)
    names = re.escape(", ".join(map(repr, lost)))
    with pytest.raises(RuntimeError, match=f"^{names}: replaced since"):
        handle.check(model)
    # What the message says to do.
    handle.remove()
    assert not hooks_on(model)
    loss_of(model, X[0]).backward()
    plain = gradients(model)
    model.zero_grad()
    handle = centralize_backward(model)
    loss_of(model, X[0]).backward()
    handle.check(model)
    require_same(gradients(model), gcfunc.centralize(plain))
    require_different(plain, gradients(model), handle.names)


def test_dtensors_are_saved_without_a_warning() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), of_one_process()))
    handle = centralize_backward(model)
    with pytest.raises(RuntimeError, match=r"^'weight': replaced since"):
        handle.check(through_a_file(model))


def converted(model: nn.Module) -> nn.Module:
    model.to(torch.float32).to(F64)
    return model


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict(mlp().state_dict())
    return model


def compiled(model: nn.Module) -> nn.Module:
    optimized: Any = torch.compile(model, backend="eager")
    return optimized


KEPT: dict[str, tuple[Replace, Replace]] = {
    "nothing": (itself, itself),
    "model.to(dtype)": (itself, converted),
    "load_state_dict": (itself, loaded),
    "in a module": (itself, nn.Sequential),
    "DDP": (itself, DistributedDataParallel),
    "compile": (itself, compiled),
    "DDP of compile": (itself, lambda model: DistributedDataParallel(compiled(model))),
    "FSDP2, nothing": (sharded, itself),
    "FSDP2, model.to(dtype)": (sharded, converted),
}


@pytest.mark.parametrize("case", KEPT)
def test_check_passes_where_hooks_still_run(case: str) -> None:
    prepare, wrap = KEPT[case]
    model = prepare(mlp())
    handle = centralize_backward(model)
    inside = wrap(model)
    handle.check(inside)
    handle.check(model)
    loss_of(inside, X[0]).backward()
    have = gradients(model)
    handle.remove()
    inside.zero_grad()
    loss_of(inside, X[0]).backward()
    require_same(have, gcfunc.centralize(gradients(model)))
    require_different(gradients(model), have, handle.names)


def test_nothing_is_kept_alive() -> None:
    model = mlp()
    handle = centralize_backward(model)
    loss_of(model, X[0]).backward()
    refs: list[Any] = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5
    assert handle.names == BOTH
    with pytest.raises(RuntimeError, match="replaced"):
        handle.check(mlp())


def test_ddp_and_what_was_registered_with_it_go_together() -> None:
    model = mlp()
    ddp = DistributedDataParallel(model)
    register_ddp(ddp)
    loss_of(ddp, X[0]).backward()
    with pytest.raises(ValueError, match="already centralized"):
        centralize_backward(model)
    del ddp
    gc.collect()
    centralize_backward(model)
    refs = [*map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


# Refused


def sparse_model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))


def partly_sharded() -> nn.Module:
    model = mlp()
    fully_shard(model[0], mesh=of_one_process())
    return model


def registered() -> nn.Module:
    model = mlp()
    centralize_backward(model, lambda name, p: name == "2.weight")
    return model


def complex_model() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Complex modules", UserWarning)
        return nn.Linear(3, 2, dtype=torch.complex64)


def flattened() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP is switching", UserWarning)
        return FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))


def wrapped(model: nn.Module | None = None) -> DistributedDataParallel:
    return DistributedDataParallel(model or mlp())


def with_comm_hook() -> DistributedDataParallel:
    ddp = wrapped()
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    return ddp


def with_gc() -> DistributedDataParallel:
    ddp = wrapped()
    register_ddp(ddp)
    return ddp


def delayed() -> DistributedDataParallel:
    model = mlp()
    return DistributedDataParallel(
        model,
        delay_all_reduce_named_params=[("0.weight", model.get_parameter("0.weight"))],
        param_to_hook_all_reduce=model.get_parameter("2.weight"),
    )


def with_python_reducer() -> DistributedDataParallel:
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        return wrapped()


Refused = tuple[Callable[[], Any], type[Exception], str]
REFUSED: dict[str, Refused] = {
    "no module": (lambda: [mlp()], TypeError, r"torch.nn.Module, got list"),
    "FSDP1": (flattened, TypeError, r"\(FSDP1\).*fully_shard"),
    "no weights": (lambda: nn.LayerNorm(3), ValueError, r"selects none of 2 tensors \(weight \(3,"),
    "no parameters": (nn.Tanh, ValueError, r"selects none of 0 tensors"),
    "registered": (registered, ValueError, r"^'2.weight': already centralized"),
    "registered by DDP": (with_gc, ValueError, r"^'module.0.weight', .*: already centralized"),
    "sparse": (sparse_model, ValueError, r"^'0' has sparse=True.*sparse=.rows. or .skip."),
    "sparse alone": (lambda: SPARSE["Embedding"](True), ValueError, r"^'Embedding' has sparse"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, r"'0.weight' has no shape yet"),
    "meta": (lambda: nn.Linear(3, 2, device="meta"), TypeError, r"'weight' is on the meta device"),
    "complex": (complex_model, TypeError, r"'weight' has dtype torch.complex64"),
    "partly sharded": (partly_sharded, ValueError, r"^'2.weight': not in .* fully_shard"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models(case: str) -> None:
    build, error, message = REFUSED[case]
    model = build()
    before = [] if isinstance(model, list) else hooks_on(model)
    with pytest.raises(error, match=message):
        centralize_backward(model)
    assert before == ([] if isinstance(model, list) else hooks_on(model))


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown where": ({"where": "gcx"}, ValueError, r"one of 'gc', 'gcc', got 'gcx'"),
    "selects nothing": ({"where": "gcc"}, ValueError, r"where='gcc' selects none of 4 tensors"),
    "no kind of where": ({"where": 5}, TypeError, r"where must have the structure"),
    "mask": ({"where": {"x": True}}, ValueError, r"missing .*'2.weight'; unexpected 'x'"),
    "units": ({"where": lambda name, p: Units(2)}, ValueError, r"Units.* does not fit '0.weight'"),
    "unknown sparse": ({"sparse": "no"}, ValueError, r"'error', 'rows', 'skip'.*got 'no'"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_refused_arguments(case: str) -> None:
    arguments, error, message = ARGUMENTS[case]
    model = mlp()
    with pytest.raises(error, match=message):
        centralize_backward(model, **arguments)
    assert not hooks_on(model)


DDP: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no DDP": (mlp, {}, TypeError, r"DistributedDataParallel, got Sequential"),
    "PowerSGD": (wrapped, {"inner": powerSGD_hook}, TypeError, r"PowerSGDState.*got ProcessG"),
    "state": (wrapped, {"state": "group"}, TypeError, r"state must be a ProcessGroup.*got str"),
    "nothing selected": (wrapped, {"where": "gcc"}, ValueError, r"selects none of 4 tensors"),
    "communication hook": (with_comm_hook, {}, RuntimeError, r"has a .* already; .*as inner"),
    "registered by DDP": (with_gc, {}, RuntimeError, r"has a communication hook already"),
    "registered": (lambda: wrapped(registered()), {}, ValueError, r"^'module.2.weight': already"),
    "delayed": (delayed, {}, ValueError, r"delay_all_reduce_named_params.*use centralize_backward"),
    "python reducer": (with_python_reducer, {}, ValueError, r"python_reducer.*centralize_backward"),
    "sparse": (lambda: wrapped(sparse_model()), {}, ValueError, r"^'module.0' has .*=.rows."),
}


@pytest.mark.parametrize("case", DDP)
def test_refused_for_ddp(case: str) -> None:
    build, arguments, error, message = DDP[case]
    ddp = build()
    before = hooks_on(ddp)
    with pytest.raises(error, match=message):
        register_ddp(ddp, **arguments)
    assert hooks_on(ddp) == before


def test_refused_where_compiled_code_drops_hooks() -> None:
    model = mlp()
    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(RuntimeError, match="trace_autograd_ops"),
    ):
        centralize_backward(model)
    assert not hooks_on(model)


def test_a_registration_that_fails_midway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    last = model.get_parameter("2.weight")

    def fail(hook: object) -> None:
        raise MemoryError

    monkeypatch.setattr(last, "register_hook", fail)
    with pytest.raises(MemoryError):
        centralize_backward(model)
    assert not hooks_on(model)
    monkeypatch.undo()
    assert centralize_backward(model).names == BOTH


RULES: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": ("gcx", ValueError, "one of 'gc', 'gcc', got 'gcx'"),
    "predicate": (lambda name, p: True, TypeError, "masks and predicates need names"),
    "mask": ({"weight": True}, TypeError, "gcfunc.hooks.register_ddp knows"),
}


@pytest.mark.parametrize("rule", RULES)
def test_communication_hooks_know_rules_only(rule: str) -> None:
    where, error, message = RULES[rule]
    with pytest.raises(error, match=message):
        ddp_comm_hook(where=where)


def test_sparse_layers_that_do_not_matter() -> None:
    model = sparse_model()
    assert centralize_backward(model, lambda name, p: name == "1.weight").names == ("1.weight",)
    model = sparse_model()
    model[0].requires_grad_(False)
    assert centralize_backward(model).names == ("0.weight", "1.weight")


def test_one_hook_for_each_parameter() -> None:
    model = mlp()
    first = centralize_backward(model, lambda name, p: name == "0.weight")
    second = centralize_backward(model, lambda name, p: name == "2.weight")
    with pytest.raises(ValueError, match=r"'0.weight', '2.weight': already"):
        centralize_backward(model)
    first.remove()
    with pytest.raises(ValueError, match=r"^'2.weight': already"):
        centralize_backward(model)
    second.remove()
    third = centralize_backward(model)
    assert third.names == BOTH
    third.remove()
    assert register_ddp(wrapped(model)) == ("module.0.weight", "module.2.weight")


def test_what_never_trains_is_left_out() -> None:
    model = mlp()
    model.register_parameter(
        "quantized", nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    )
    with torch.inference_mode():
        model.register_parameter("inferred", nn.Parameter(torch.ones(2, 3), requires_grad=False))
    assert centralize_backward(model).names == BOTH


def test_private_names_of_torch_that_hook_mode_reads() -> None:
    ddp = DistributedDataParallel(mlp())
    weight = ddp.module.get_parameter("0.weight")
    assert isinstance(weight._cdata, int)
    assert weight._backward_hooks is None
    assert ddp._comm_hooks == []
    assert not ddp._delay_all_reduce_params
    assert ddp._use_python_reducer is False


class NoneForWeight(torch.autograd.Function):
    """Uses a weight, and gives no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_functions_that_give_no_gradient() -> None:
    model = nn.Linear(3, 2)
    centralize_backward(model)
    x = torch.randn(4, 3, requires_grad=True)
    NoneForWeight.apply(x, model.weight).sum().backward()
    assert model.weight.grad is None
    assert x.grad is not None


def test_trace_autograd_ops_set_later_is_noticed() -> None:
    model = nn.Linear(3, 2)
    with (
        centralize_backward(model) as handle,
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(RuntimeError, match="drops gradient hooks"),
    ):
        handle.check(model)
