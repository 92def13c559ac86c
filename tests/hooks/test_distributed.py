"""Hook mode under DDP equals one process on the whole batch, by value.

Row means alone would be zero after centralizing the wrong thing too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powerSGD
from torch.nn.parallel import DistributedDataParallel

import gcfunc
from gcfunc.hooks import centralize_backward, ddp_comm_hook, register_ddp
from tests.cases import largest_difference
from tests.distributed import backward, data, expected, gradients, make, mine, require_same
from tests.models import (
    CheckpointedOtherwise,
    CheckpointedReentrant,
    Net,
    Strided,
    Tied,
    WithUnused,
)
from tests.processes import Processes

Register = Callable[[DistributedDataParallel], Any]
REGISTER: dict[str, Register] = {"tensor hooks": centralize_backward, "comm hook": register_ddp}

CASES: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "plain": (Net, {}),
    "bucket views": (Net, {"gradient_as_bucket_view": True}),
    "static graph": (Net, {"static_graph": True}),
    "static graph, bucket views": (Net, {"static_graph": True, "gradient_as_bucket_view": True}),
    "tiny buckets": (Net, {"bucket_cap_mb": 1e-4}),
    "tiny buckets as views": (Net, {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}),
    "tied": (Tied, {}),
    "tied, static graph": (Tied, {"static_graph": True}),
    "unused": (WithUnused, {"find_unused_parameters": True}),
    "checkpointed": (CheckpointedOtherwise, {}),
    "checkpointed, reentrant": (CheckpointedReentrant, {"static_graph": True}),
    "strides": (Strided, {}),
    "strides, bucket views": (Strided, {"gradient_as_bucket_view": True}),
}
both = pytest.mark.parametrize("register", REGISTER)


def each_step(register: Register, kind: type[Net], options: dict[str, Any]) -> None:
    ddp = DistributedDataParallel(make(kind), **options)
    register(ddp)
    images, labels = mine(data())[0]
    for _ in range(3):  # a static graph, and buckets that were rebuilt, show from the second on
        ddp.zero_grad()
        backward(ddp, images, labels)
        require_same(gradients(ddp), expected(kind))


@both
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(two: Processes, case: str, register: str) -> None:
    two(each_step, REGISTER[register], *CASES[case])


@both
def test_four_processes(four: Processes, register: str) -> None:
    four(each_step, REGISTER[register], Net, {"bucket_cap_mb": 1e-4})


def accumulate(register: Register, options: dict[str, Any]) -> None:
    ddp = DistributedDataParallel(make(Net), **options)
    register(ddp)
    parts = mine(data(), parts=4)
    for _ in range(2):
        ddp.zero_grad()
        with ddp.no_sync():
            for images, labels in parts[:-1]:
                backward(ddp, images, labels, share=1 / len(parts))
        backward(ddp, *parts[-1], share=1 / len(parts))
        require_same(gradients(ddp), expected(Net))


@both
@pytest.mark.parametrize("views", [False, True])
def test_accumulation_without_communication(two: Processes, register: str, views: bool) -> None:
    two(accumulate, REGISTER[register], {"gradient_as_bucket_view": views})


def in_groups(register: Register) -> None:
    """Two halves of the world, each with a model and a batch of its own."""
    halves = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    half = halves[dist.get_rank() // 2]
    assert isinstance(half, dist.ProcessGroup)
    ddp = DistributedDataParallel(make(Net), process_group=half)
    register(ddp)
    images, labels = data()
    sign = 1 if half is halves[0] else -1
    backward(ddp, *mine((sign * images, labels), group=half)[0])
    require_same(gradients(ddp), expected(Net, batch=(sign * images, labels)))
    for group in halves:
        dist.destroy_process_group(group)


@both
def test_groups_of_processes(four: Processes, register: str) -> None:
    four(in_groups, REGISTER[register])


def masked(register: Callable[..., Any]) -> None:
    ddp = DistributedDataParallel(make(Net))
    register(ddp, where=gcfunc.select(ddp))
    backward(ddp, *mine(data())[0])
    mask = gcfunc.select(ddp.module)
    assert not mask["positions"]
    require_same(gradients(ddp), expected(Net, where=mask))


@both
def test_mask(two: Processes, register: str) -> None:
    two(masked, REGISTER[register])


def rule_in_a_hook_of_ones_own() -> None:
    ddp = DistributedDataParallel(make(Net))
    ddp.register_comm_hook(None, ddp_comm_hook(where="gcc"))
    backward(ddp, *mine(data())[0])
    require_same(gradients(ddp), expected(Net, where="gcc"))


def test_comm_hook_by_itself(two: Processes) -> None:
    two(rule_in_a_hook_of_ones_own)


def power_sgd(ddp: DistributedDataParallel) -> powerSGD.PowerSGDState:
    return powerSGD.PowerSGDState(
        ddp.process_group, matrix_approximation_rank=1, start_powerSGD_iter=2
    )


Compression = tuple[Any, Callable[[DistributedDataParallel], Any] | None]
COMPRESSIONS: dict[str, Compression] = {
    "fp16": (default_hooks.fp16_compress_hook, None),
    "bf16": (default_hooks.bf16_compress_hook, None),
    "PowerSGD": (powerSGD.powerSGD_hook, power_sgd),
}


def compressed(compression: str) -> None:
    hook, state = COMPRESSIONS[compression]
    dtype = torch.float32

    def ddp() -> DistributedDataParallel:
        return DistributedDataParallel(make(Net).to(dtype))

    alone, after, before = ddp(), ddp(), ddp()
    for model in (alone, before):
        # DDP refuses bf16_compress_hook, by its name, where there is no CUDA.
        model.register_comm_hook(
            state(model) if state else model.process_group,
            lambda state, bucket: hook(state, bucket),
        )
    centralize_backward(before)
    register_ddp(after, hook, state=state(after) if state else None)
    images, labels = mine(data())[0]
    for _ in range(4):  # PowerSGD begins with the third
        for model in (alone, after, before):
            model.zero_grad()
            torch.manual_seed(0)
            backward(model, images.to(dtype), labels)
        want = gcfunc.centralize(gradients(alone))
        assert largest_difference(gradients(after), want) <= 1e-7
        assert largest_difference(gradients(alone), want) > 1e-3
    assert all(g.dtype is dtype for g in gradients(after).values())
    assert row_means(after) < 1e-8
    if state is None:
        # What a communication hook is for: rounding undoes what came before. PowerSGD does not.
        assert row_means(before) > 1e-6


def row_means(model: nn.Module) -> float:
    means = [g.flatten(1).double().mean(1) for g in gradients(model).values() if g.ndim > 1]
    return float(torch.cat(means).abs().max())


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compression(two: Processes, compression: str) -> None:
    two(compressed, compression)


def with_compile(register: Register, inside: bool, config: dict[str, Any]) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(**config):
        model: Any = make(Net)
        if inside:
            model.forward = torch.compile(model.forward, fullgraph=True)
        ddp = DistributedDataParallel(model)
        register(ddp)
        run: Any = ddp if inside else torch.compile(ddp)
        images, labels = mine(data())[0]
        compiled = counters["stats"]["unique_graphs"]
        for _ in range(3):
            ddp.zero_grad()
            if config.get("compiled_autograd"):
                torch.compile(lambda: backward(run, images, labels))()
            else:
                backward(run, images, labels)
            require_same(gradients(ddp), expected(Net))
        assert counters["stats"]["unique_graphs"] > compiled


@both
@pytest.mark.parametrize("inside", [True, False], ids=["DDP(compile)", "compile(DDP)"])
def test_torch_compile(two: Processes, register: str, inside: bool) -> None:
    two(with_compile, REGISTER[register], inside, {})


def test_compiled_autograd(two: Processes) -> None:
    config = {"compiled_autograd": True, "optimize_ddp": "python_reducer"}
    two(with_compile, centralize_backward, False, config)
