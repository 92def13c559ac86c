"""The drop-ins under DDP and FSDP2 equal one process on the whole batch, by value.

And torch.distributed.checkpoint saves them and has them go on, in other processes too.
"""

import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR

import gcfunc
from tests.cases import Params, largest_difference
from tests.distributed import backward, data, make, mine, require_same, whole
from tests.models import Net
from tests.processes import Processes

STEPS = 4
CLIP = 0.5

Kind = tuple[str, dict[str, Any]]
KINDS: dict[str, Kind] = {
    "plain": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "adamw": ("AdamW", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adagrad": ("Adagrad", {"lr": 0.1}),
    "ranger": ("Ranger", {"lr": 0.1, "weight_decay": 0.1, "k": 3}),
}


def chosen(name: str, p: Tensor) -> bool:
    """A choice by name, that no checkpoint could hold."""
    return p.ndim > 1 and "positions" not in name


def optimizer(kind: Kind, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """In two groups, with names."""
    name, kwargs = kind
    named = [*model.named_parameters()]
    opt = getattr(gcfunc.optim, name)(
        [
            {"params": [(n, p) for n, p in named if p.ndim > 1]},
            {"params": [(n, p) for n, p in named if p.ndim == 1], "weight_decay": 0.0, "gc": None},
        ],
        **({"gc": gcfunc.GC(chosen)} | kwargs | options),
    )
    assert isinstance(opt, torch.optim.Optimizer)
    return opt


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def by_layer(model: nn.Module) -> nn.Module:
    """FSDP2, in parts of different sizes and empty ones."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def by_column(model: nn.Module) -> nn.Module:
    """FSDP2, with rows cut, over which the mean runs."""

    def placement(p: nn.Parameter) -> Shard:
        return Shard(1 if p.ndim > 1 and p.shape[1] % 2 == 0 else 0)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    return model


def alone(model: nn.Module) -> nn.Module:
    return model


Wrap = Callable[[nn.Module], nn.Module]
WRAPS: dict[str, Wrap] = {"ddp": replicated, "by-layer": by_layer, "by-column": by_column}


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    steps: int = STEPS,
    *,
    parts: int = 1,
    before: Callable[[nn.Module], object] = lambda model: None,
) -> Params:
    """Steps on the same batch, of clipped gradients, and the parameters that they lead to."""
    for _ in range(steps):
        opt.zero_grad()
        batches = mine(data(), parts) if dist.is_initialized() else [data()]
        for batch in batches:
            last = batch is batches[-1]
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            backward(model, *batch, share=1 / len(batches))
        clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        before(model)
        opt.step()
    return values(model)


def values(model: nn.Module) -> Params:
    model = getattr(model, "module", model)
    return {n: whole(p).detach().clone() for n, p in model.named_parameters()}


def subtract_means(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.grad is not None and chosen(name, p):
            p.grad -= p.grad.mean(tuple(range(1, p.ndim)), keepdim=True)


def one_process(kind: Kind, *, gc: bool = True) -> Params:
    """What torch's optimizer makes of centralized gradients; of Ranger, which it lacks, ours."""
    name, kwargs = kind
    model = make(Net)
    if not hasattr(torch.optim, name):
        return train(model, optimizer(kind, model, **({} if gc else {"gc": None})))
    ps = [*model.parameters()]
    groups = [
        {"params": [p for p in ps if p.ndim > 1]},
        {"params": [p for p in ps if p.ndim == 1], "weight_decay": 0.0},
    ]
    opt = getattr(torch.optim, name)(groups, **kwargs)
    return train(model, opt, before=subtract_means if gc else lambda model: None)


def trained(kind: Kind, wrap: Wrap, parts: int) -> Params:
    model = wrap(make(Net))
    opt = optimizer(kind, model)
    result = train(model, opt, parts=parts)
    for p, entry in opt.state.items():
        if isinstance(p, DTensor):
            slots = [t for slot, t in entry.items() if slot != "step"]
            assert all(isinstance(t, DTensor) and t.placements == p.placements for t in slots)
    return result


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_training_equals_one_process(two: Processes, wrap: Wrap, kind: Kind) -> None:
    want = one_process(kind)
    for parts in (1, 2):
        for have in two(trained, kind, wrap, parts):
            require_same(have, want)
    assert largest_difference(want, one_process(kind, gc=False)) > 1e-3


def trained_compiled(wrap: Wrap) -> tuple[Params, int]:
    torch.compiler.reset()
    counters.clear()
    model = wrap(make(Net))
    opt = optimizer(KINDS["momentum"], model, compile=True)
    schedule = ExponentialLR(opt, 0.5)
    for _ in range(STEPS):
        result = train(model, opt, 1)
        schedule.step()
    return result, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("wrap", [replicated, by_layer])
def test_compiled_steps_compile_once(two: Processes, wrap: Wrap) -> None:
    model = make(Net)
    opt = optimizer(KINDS["momentum"], model, compile=False)
    schedule = ExponentialLR(opt, 0.5)
    for _ in range(STEPS):
        want = train(model, opt, 1)
        schedule.step()
    for have, graphs in two(trained_compiled, wrap):
        require_same(have, want)
        assert graphs == 2  # one for each group


DECAYED: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}


def sharded_by_zero(gc: str) -> Params:
    """The optimizer's state in parts, of which one may have nothing that GC takes."""
    model = DistributedDataParallel(make(Net))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gc='gcc' selects none")
        opt = ZeroRedundancyOptimizer(model.parameters(), gcfunc.optim.AdamW, **DECAYED, gc=gc)
    return train(model, opt)


@pytest.mark.parametrize("gc", ["gc", "gcc"])
def test_zero_equals_one_process(two: Processes, gc: str) -> None:
    models = [make(Net), make(Net)]
    want, plain = (
        train(model, gcfunc.optim.AdamW(model.parameters(), **DECAYED, gc=choice))
        for model, choice in zip(models, (gc, None), strict=True)
    )
    for have in two(sharded_by_zero, gc):
        require_same(have, want)
    assert largest_difference(want, plain) > 1e-3


def a_bias_of_two() -> list[str]:
    """Each process with one layer's bias alone, and with a layer that a rule does not take."""
    layer = nn.Linear(3, 2)
    gcfunc.optim.SGD([layer.bias], lr=0.1, gc="gc")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gcfunc.optim.SGD(layer.parameters(), lr=0.1, gc="gcc")
    return [str(warning.message) for warning in told]


def test_a_share_without_anything_to_centralize_is_told_of(two: Processes) -> None:
    message = (
        "gc='gcc' selects none of the parameters (0 (2, 3), 1 (2,)); gc=None says so, and is "
        "right where other processes hold what it selects"
    )
    assert two(a_bias_of_two) == [[message]] * 2


HALF = STEPS // 2
OPTIONS = {
    "as it is": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "whole": StateDictOptions(full_state_dict=True),
}


def saved(
    model: nn.Module, opt: torch.optim.Optimizer, options: StateDictOptions
) -> dict[str, Any]:
    states = get_state_dict(model, opt, options=options)
    return dict(zip(("model", "optimizer"), states, strict=True))


def save_and_go_on(kind: Kind, wrap: Wrap, options: StateDictOptions, file: Path) -> Params:
    model = wrap(make(Net))
    opt = optimizer(kind, model)
    train(model, opt, HALF)
    save(saved(model, opt, options), checkpoint_id=file)
    return train(model, opt, HALF)


def load_and_go_on(kind: Kind, wrap: Wrap, options: StateDictOptions, file: Path) -> Params:
    model = make(Net)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model = wrap(model)  # type: ignore[assignment]
    opt = optimizer(kind, model)
    before = values(model)
    state = saved(model, opt, options)
    assert largest_difference(values(model), before) == 0
    load(state, checkpoint_id=file, no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        opt,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    return train(model, opt, HALF)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit")
@pytest.mark.parametrize(
    ("kind", "options"),
    # An optimizer without state torch cannot load whole; its own neither.
    [pair for pair in product(KINDS, OPTIONS) if pair != ("plain", "whole")],
)
def test_training_goes_on_from_a_distributed_checkpoint(
    two: Processes, kind: str, options: str, tmp_path: Path
) -> None:
    how = KINDS[kind], by_layer, OPTIONS[options], tmp_path
    wants = two(save_and_go_on, *how)
    haves = two(load_and_go_on, *how)
    assert [*map(largest_difference, haves, wants)] == [0, 0]
    # One process has all of what it loads.
    require_same(load_and_go_on(KINDS[kind], alone, OPTIONS[options], tmp_path), wants[0])
