"""Hooks on a device: backward by itself, and under DDP in one process (NCCL on a GPU)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel

import gcfunc
from gcfunc.hooks import centralize_backward, register_ddp
from tests.cases import Params
from tests.distributed import backward, data, expected, gradients, make
from tests.gpu.cases import distance, each, wide
from tests.models import Net, Strided, Tied

MODELS = {kind.__name__: kind for kind in (Net, Tied, Strided)}
each_model = pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(scope="module")
def group(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def taken(model: nn.Module, device: str) -> Params:
    """The gradients of the batch, wide and on the CPU."""
    images, labels = data()
    dtype = next(model.parameters()).dtype
    backward(model, images.to(device, dtype), labels.to(device))
    return each(wide, gradients(model))


@each_model
def test_backward(kind: type[Net], device: str) -> None:
    model = make(kind).to(device)
    handle = centralize_backward(model)
    assert distance(taken(model, device), expected(kind)) <= 1e-10
    handle.remove()
    model.zero_grad()
    # Without the hooks they are others.
    assert distance(taken(model, device), expected(kind)) > 1e-3


def by_backward(ddp: DistributedDataParallel) -> object:
    return centralize_backward(ddp)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("centralize", [by_backward, register_ddp])
@each_model
def test_ddp(
    kind: type[Net], centralize: Callable[[Any], object], views: bool, device: str
) -> None:
    ddp = DistributedDataParallel(make(kind).to(device), gradient_as_bucket_view=views)
    handle = centralize(ddp)
    for _ in range(2):  # DDP makes its buckets anew after the first step
        ddp.zero_grad()
        assert distance(taken(ddp, device), expected(kind)) <= 1e-10
    assert handle


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("compress", [fp16_compress_hook, bf16_compress_hook])
def test_ddp_that_compresses(compress: Callable[..., Any], device: str) -> None:
    """Rows sum up to 0 after it, exactly as far as the parameters' dtype goes."""
    ddp = DistributedDataParallel(make(Net).to(device))
    register_ddp(ddp, compress)
    have = taken(ddp, device)
    assert distance(have, expected(Net)) <= 1e-2
    for g in have.values():
        if g.ndim > 1:
            assert float(g.flatten(1).mean(1).abs().max()) <= 1e-12


@pytest.mark.usefixtures("group")
def test_a_donated_step_takes_views_of_buckets(device: str) -> None:
    """At the addresses that DDP gives them, with the step's own GC."""
    ends = []
    for gc in ("gc", None):
        ddp = DistributedDataParallel(make(Net).float().to(device), gradient_as_bucket_view=True)
        opt = gcfunc.compile(gcfunc.sgd(0.1, gc=gc))
        named: dict[str, torch.Tensor] = dict(ddp.module.named_parameters())
        state = opt.init(named)
        for _ in range(3):
            ddp.zero_grad()
            taken(ddp, device)
            opt.step(named, {name: p.grad for name, p in named.items()}, state)
        ends.append(each(wide, named))
    reference = make(Net)
    params: Any = dict(reference.named_parameters())
    plain = gcfunc.sgd(0.1, gc="gc")
    state = plain.init(params)
    for _ in range(3):
        reference.zero_grad()
        taken(reference, "cpu")
        new, state = plain.step(params, {name: p.grad for name, p in params.items()}, state)
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(new[name])
    want = each(wide, params)
    assert distance(ends[0], want) <= 1e-4
    assert distance(ends[1], want) > 1e-3
