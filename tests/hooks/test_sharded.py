"""Hook mode under FSDP2 and tensor parallel equals one process on the whole batch, by value."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gcfunc
from gcfunc._tensors.versions import TORCH
from gcfunc.hooks import centralize_backward, register_ddp
from tests.cases import largest_difference
from tests.distributed import backward, data, expected, gradients, make, mine, require_same
from tests.models import CheckpointedOtherwise, Net, Tied
from tests.processes import Processes


def world() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def by_layer(model: nn.Module, **options: Any) -> FSDPModule:
    for module in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        fully_shard(module, mesh=world(), **options)
    return fully_shard(model, mesh=world(), **options)


def at_the_root(model: nn.Module, **options: Any) -> FSDPModule:
    return fully_shard(model, mesh=world(), **options)


def replicated_groups(model: nn.Module, **options: Any) -> FSDPModule:
    """HSDP: sharded in pairs, which are copies of each other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.fc, mesh=mesh, **options)  # type: ignore[arg-type]
    return fully_shard(model, mesh=mesh, **options)


def by_column(model: nn.Module) -> FSDPModule:
    """Matrices sharded along their width, where it divides."""

    def placement(p: nn.Parameter) -> Shard:
        return Shard(1 if p.ndim > 1 and p.shape[1] % 2 == 0 else 0)

    return fully_shard(model, mesh=world(), shard_placement_fn=placement)


Wrap = Callable[[nn.Module], FSDPModule]


def fsdp_step(wrap: Wrap, kind: type[Net], parts: int, sync: bool, options: dict[str, Any]) -> None:
    model = make(kind)
    sharded = wrap(model, **options)
    with centralize_backward(model) as handle:
        for _ in range(2):
            model.zero_grad()
            batches = mine(data(), parts)
            for batch in batches:
                sharded.set_requires_gradient_sync(sync or batch is batches[-1])
                backward(model, *batch, share=1 / parts)
            require_same(gradients(model), expected(kind))
            handle.check(model)
    for p in model.parameters():
        assert isinstance(p.grad, DTensor)
        assert isinstance(p, DTensor)
        assert p.grad.placements == p.placements


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (by_layer, Net),
        (at_the_root, Net),
        (by_column, Net),
        (at_the_root, Tied),
        (by_column, Tied),
        (by_layer, CheckpointedOtherwise),
    ],
)
def test_fsdp2(two: Processes, wrap: Wrap, kind: type[Net]) -> None:
    two(fsdp_step, wrap, kind, 1, True, {})


@pytest.mark.parametrize("wrap", [by_layer, replicated_groups])
def test_fsdp2_with_empty_shards(four: Processes, wrap: Wrap) -> None:
    four(fsdp_step, wrap, Net, 1, True, {})


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("wrap", [by_layer, replicated_groups])
def test_fsdp2_accumulation(four: Processes, wrap: Wrap, sync: bool) -> None:
    four(fsdp_step, wrap, Net, 2, sync, {})


@pytest.mark.parametrize(
    "options",
    [
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"reshard_after_forward": False},
        {"mp_policy": MixedPrecisionPolicy()},
    ],
    ids=["CPU offload", "no reshard", "policy"],
)
def test_fsdp2_options(two: Processes, options: dict[str, Any]) -> None:
    two(fsdp_step, by_layer, Net, 1, True, options)


def mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain, hooked = make(Net).float(), make(Net).float()
    for model in (plain, hooked):
        by_layer(model, mp_policy=policy)
    centralize_backward(hooked)
    images, labels = mine(data())[0]
    for model in (plain, hooked):
        backward(model, images.float(), labels)
    want = gcfunc.centralize(gradients(plain))
    assert largest_difference(gradients(plain), want) > 1e-3
    assert largest_difference(gradients(hooked), want) <= 1e-7


def test_fsdp2_mixed_precision(two: Processes) -> None:
    two(mixed_precision)


def ignored_and_frozen() -> None:
    """Of parameters that FSDP2 does not manage, the ordinary hook is the right one."""
    model = make(Net)
    ignored = {model.get_parameter("fc.weight"), model.get_parameter("out.weight")}
    fully_shard(model, mesh=world(), ignored_params=ignored)
    model.conv2.weight.requires_grad_(False)
    handle = centralize_backward(model)
    assert "fc.weight" in handle.names
    images, labels = mine(data())[0]
    backward(model, images, labels)
    assert model.conv2.weight.grad is None
    want = make(Net)
    backward(want, images, labels)
    # Not averaged over processes.
    for name in ("fc", "out"):
        g = gradients(want)[f"{name}.weight"]
        have = gradients(model)[f"{name}.weight"]
        require_same({"": have}, {"": gcfunc.centralize(g)})
    require_same({"": gradients(model)["conv.weight"]}, {"": expected(Net)["conv.weight"]})


def test_fsdp2_ignored_and_frozen(two: Processes) -> None:
    two(ignored_and_frozen)


def after_evaluation() -> None:
    """A forward pass without a backward leaves FSDP2's root gathered."""
    model = make(Net)
    fully_shard(model, mesh=world())
    images, labels = mine(data())[0]
    with torch.no_grad():
        model(images)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    handle = centralize_backward(model)
    backward(model, images, labels)
    require_same(gradients(model), expected(Net))
    with torch.no_grad():
        model(images)
    handle.check(model)


def test_fsdp2_after_evaluation(two: Processes) -> None:
    two(after_evaluation)


class Block(nn.Module):
    """A transformer's feed-forward half, of widths that do and do not divide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(6, width)
        self.down = nn.Linear(width, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.down(torch.tanh(self.up(x)))))


def block(width: int) -> Block:
    torch.manual_seed(0)
    return Block(width).double()


def block_input() -> Tensor:
    return torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def parallel(model: Block, mesh: DeviceMesh) -> None:
    """Shard(0), then Shard(1), then Replicate."""
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    for name, p in [*model.out.named_parameters()]:
        replica = distribute_tensor(p.detach(), mesh, [Replicate()])
        setattr(model.out, name, nn.Parameter(replica))
    model.out.register_forward_pre_hook(
        lambda module, args: DTensor.from_local(args[0], mesh, [Replicate()])
    )
    model.out.register_forward_hook(lambda module, args, out: out.to_local())


def block_gradients(width: int, x: Tensor) -> dict[str, Tensor]:
    model = block(width)
    model(x).square().mean().backward()
    return gradients(model)


def tensor_parallel(width: int) -> tuple[int, int]:
    """How often processes talk in the backward pass, without and with hooks."""
    model = block(width)
    parallel(model, world())
    counts = []
    for hooked in (False, True):
        if hooked:
            handle = centralize_backward(model)
        model.zero_grad()
        loss = model(block_input()).square().mean()
        with CommDebugMode() as communication:
            loss.backward()
        counts.append(communication.get_total_counts())
    plain = block_gradients(width, block_input())
    want = gcfunc.centralize(plain)
    assert largest_difference(plain, want) > 1e-3
    require_same(gradients(model), want)
    for p in model.parameters():
        assert isinstance(p.grad, DTensor)
        assert isinstance(p, DTensor)
        assert p.grad.placements == p.placements
    handle.check(model)
    return counts[0], counts[1]


@pytest.mark.parametrize("width", [8, 7])
def test_tensor_parallel_talks_once_for_a_weight_cut_along_its_rows(
    two: Processes, width: int
) -> None:
    for without, with_hooks in two(tensor_parallel, width):
        assert with_hooks == without + 1  # for down.weight alone


def over_tensor_parallel() -> None:
    """FSDP2 over tensor parallel: strided shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = block(8)
    parallel(model, mesh["tensor"])
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh["data"])
    handle = centralize_backward(model)
    x = block_input().chunk(2)[mesh["data"].get_local_rank()]
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
        require_same(gradients(model), gcfunc.centralize(block_gradients(8, block_input())))
    handle.check(model)


def test_fsdp2_over_tensor_parallel(four: Processes) -> None:
    four(over_tensor_parallel)


def of_a_sharded_batch() -> None:
    """Each process then has a summand of a replicated weight's gradient."""
    mesh = world()
    model = block(8)
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            replica = distribute_tensor(p.detach(), mesh, [Replicate()])
            setattr(module, name, nn.Parameter(replica))
    placements = []
    model.up.weight.register_hook(lambda g: placements.extend(g.placements))
    x = distribute_tensor(block_input(), mesh, [Shard(0)])
    counts = []
    for hooked in (False, True):
        if hooked:
            centralize_backward(model)
        model.zero_grad()
        loss = model(x).square().mean()
        with CommDebugMode() as communication:
            loss.backward()
        counts.append(communication.get_total_counts())
    assert counts[0] == counts[1]
    assert len(placements) == 2
    assert all(placement.is_partial() for placement in placements)
    require_same(gradients(model), gcfunc.centralize(block_gradients(8, block_input())))


def test_gradients_that_are_yet_to_be_added_up(two: Processes) -> None:
    two(of_a_sharded_batch)


def second_derivatives() -> None:
    """Of a gradient penalty, where a mean runs over processes."""

    def penalty(model: Block, centralize: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
        weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
        loss = model(block_input()).square().mean()
        found = torch.autograd.grad(loss, [*weights.values()], create_graph=True)
        grads = centralize(dict(zip(weights, found, strict=True)))
        squares = [g.square().sum() for g in grads.values()]
        total = sum(s.full_tensor() if isinstance(s, DTensor) else s for s in squares)
        assert isinstance(total, Tensor)
        seconds = torch.autograd.grad(total, [*weights.values()])
        return {
            n: g.full_tensor() if isinstance(g, DTensor) else g
            for n, g in zip(weights, seconds, strict=True)
        }

    # The hook sees the second derivatives too.
    want = gcfunc.centralize(penalty(block(8), gcfunc.centralize))
    without = gcfunc.centralize(penalty(block(8), lambda grads: grads))
    assert largest_difference(want, without) > 1e-3
    model = block(8)
    parallel(model, world())
    if TORCH < (2, 12):  # DTensors have no second derivatives there, whatever the hooks
        with pytest.raises(RuntimeError, match="not have been used"):
            penalty(model, lambda grads: grads)
        return
    centralize_backward(model)
    require_same(penalty(model, lambda grads: grads), want)


def test_double_backward_over_processes(two: Processes) -> None:
    two(second_derivatives)


def count_under_fsdp2(wrap: Wrap) -> tuple[int, int]:
    """How often processes talk in the backward pass, without and with hooks."""
    model = make(Net)
    wrap(model)
    counts = []
    for hooked in (False, True):
        if hooked:
            centralize_backward(model)
        model.zero_grad()
        images, labels = mine(data())[0]
        loss = nn.functional.cross_entropy(model(images), labels)
        with CommDebugMode() as communication:
            loss.backward()
        counts.append(communication.get_total_counts())
    return counts[0], counts[1]


@pytest.mark.parametrize(("wrap", "more"), [(by_layer, 0), (at_the_root, 0), (by_column, 3)])
def test_fsdp2_talks_no_more_than_weights_cut_along_their_rows_need(
    two: Processes, wrap: Wrap, more: int
) -> None:
    for without, with_hooks in two(count_under_fsdp2, wrap):
        assert with_hooks == without + more


def piece_by_piece() -> None:
    """The module at hand need not be the one that was sharded."""
    model = make(Net)
    fully_shard(model, mesh=world())
    for module in (model.conv, model.conv2, model.fc, model.out):
        handle = centralize_backward(module)
    backward(model, *mine(data())[0])
    handle.check(model)
    have, want = gradients(model), expected(Net)
    require_same({**have, "positions": want["positions"]}, want)


def test_fsdp2_module_by_module(two: Processes) -> None:
    two(piece_by_piece)


def first_of_all() -> None:
    """An optimizer that steps during backward sees centralized gradients, whoever came first."""
    model = make(Net)
    fully_shard(model, mesh=world())
    seen: dict[str, Tensor] = {}

    def step(name: str, p: nn.Parameter) -> None:
        assert isinstance(p.grad, DTensor)
        seen[name] = p.grad.full_tensor()
        p.grad = None

    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(partial(step, name))
    centralize_backward(model)
    backward(model, *mine(data())[0])
    require_same(seen, expected(Net))


def test_fsdp2_with_an_optimizer_in_backward(two: Processes) -> None:
    two(first_of_all)


class Positions(nn.Module):
    """A table is added to a batch of one: autograd hands on one gradient to both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if isinstance(self.table, DTensor):
            hidden = DTensor.from_local(hidden, self.table.device_mesh, [Replicate()])
        total = hidden + self.table[None]
        return total.to_local() if isinstance(total, DTensor) else total


def ignored_dtensor() -> None:
    """Autograd's own in a model of FSDP2's: in place, its hook would write another's gradient."""
    torch.manual_seed(0)
    plain, model = Positions().double(), Positions().double()
    model.load_state_dict(plain.state_dict())
    table = distribute_tensor(model.table.detach(), world(), [Replicate()])
    model.table = nn.Parameter(table)
    fully_shard(model, mesh=world(), ignored_params={model.table})
    handle = centralize_backward(model)
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    for each in (plain, model):
        each(x).square().sum().backward()
    require_same(gradients(model), gcfunc.centralize(gradients(plain)))
    handle.check(model)


def test_fsdp2_leaves_an_ignored_dtensor_to_autograd(two: Processes) -> None:
    two(ignored_dtensor)


def ddp_over_tensor_parallel() -> None:
    """Of what DDP makes of DTensors, the mark that it leaves is private to torch."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = block(8)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    ddp = DistributedDataParallel(model, device_mesh=mesh["data"])
    for register in (centralize_backward, register_ddp):
        with pytest.raises(TypeError, match=r"down.weight.*DDP over tensor parallel"):
            register(ddp)


def test_ddp_over_tensor_parallel_is_refused(two: Processes) -> None:
    two(ddp_over_tensor_parallel)
