"""Functional steps on DTensors equal steps on whole tensors, with the state sharded likewise."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode

import gcfunc
from tests.cases import ALGORITHMS, Params, largest_difference, make_params, random_like
from tests.distributed import backward, data, make, mine
from tests.models import Net
from tests.processes import Processes


def by_rows(name: str, p: Tensor) -> list[Placement]:
    """FSDP2's, uneven and with empty parts."""
    return [Shard(0) if p.ndim else Replicate()]


def by_columns(name: str, p: Tensor) -> list[Placement]:
    return [Shard(1) if p.ndim > 1 else Replicate()]


def mixed(name: str, p: Tensor) -> list[Placement]:
    placements: dict[str, list[Placement]]
    placements = {"linear.weight": [Shard(1)], "conv2d.weight": [Shard(0)]}
    return placements.get(name, [Replicate()])


def both_ways(name: str, p: Tensor) -> list[Placement]:
    """On a mesh of two dimensions."""
    return [Shard(0), Shard(1)] if p.ndim > 1 else [Replicate(), Replicate()]


Sharding = Callable[[str, Tensor], list[Placement]]


def mesh_for(sharding: Sharding) -> DeviceMesh:
    size = torch.distributed.get_world_size()
    return init_device_mesh("cpu", (2, size // 2) if sharding is both_ways else (size,))


def sharded(tensors: Params, sharding: Sharding) -> Params:
    mesh = mesh_for(sharding)
    return {
        name: t if name in WHOLE[sharding] else distribute_tensor(t, mesh, sharding(name, t))
        for name, t in tensors.items()
    }


# Ordinary tensors next to DTensors, as parameters are that FSDP2 was told to ignore.
WHOLE: dict[Sharding, set[str]] = {
    by_rows: set(),
    by_columns: set(),
    mixed: {"depthwise.weight", "gain"},
    both_ways: set(),
}


def full(tensors: Mapping[str, Tensor]) -> Params:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def steps(
    algorithm: str,
    gc: Any,
    sharding: Sharding,
    compiled: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    torch._dynamo.reset()
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    make = ALGORITHMS[algorithm]
    plain: Any = make(gc)
    opt = plain if compiled is None else gcfunc.compile(plain, **compiled)
    whole = make_params(dtype)
    parts = sharded(whole, sharding)
    state, want = opt.init(parts), plain.init(whole)
    without = largest_difference(
        *(make(g).step(whole, random_like(whole, 0), make(g).init(whole))[0] for g in (gc, None))
    )
    assert without > 1e-5
    for i in range(4):
        grads = random_like(whole, i)
        if i == 2:
            grads.pop("linear.bias")  # left alone
        some: dict[str, Any] = {name: grads.get(name) for name in whole}
        whole, want = plain.step(whole, some, want)
        with torch.no_grad():
            given = sharded(grads, sharding) | {n: None for n, g in some.items() if g is None}
            parts, state = opt.step(parts, given, state)
        assert largest_difference(full(parts), whole) <= tolerance
    for slot, column in state.slots.items():
        assert largest_difference(full(column), want.slots[slot]) <= tolerance
        for name, t in column.items():
            p = parts[name]
            assert isinstance(t, DTensor) == isinstance(p, DTensor)
            if isinstance(t, DTensor) and isinstance(p, DTensor):
                assert t.placements == p.placements
                assert t.to_local().shape == p.to_local().shape


@pytest.mark.parametrize("sharding", [by_rows, by_columns, mixed])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm(two: Processes, algorithm: str, sharding: Sharding) -> None:
    for gc in ("gc", gcfunc.GC("gcc", at="update")):
        two(steps, algorithm, gc, sharding)


@pytest.mark.parametrize("sharding", [by_rows, by_columns, both_ways])
@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_four_processes(four: Processes, algorithm: str, sharding: Sharding) -> None:
    four(steps, algorithm, "gc", sharding)


@pytest.mark.parametrize("sharding", [by_rows, by_columns, mixed])
@pytest.mark.parametrize("donate", [True, False])
def test_compiled(two: Processes, sharding: Sharding, donate: bool) -> None:
    two(steps, "adamw", "gc", sharding, {"donate": donate})


@pytest.mark.parametrize("sharding", [by_rows, mixed])
def test_compiled_in_single_precision(two: Processes, sharding: Sharding) -> None:
    two(steps, "sgd-nesterov", "gc", sharding, {}, torch.float32)


def count_collectives(sharding: Sharding) -> int:
    opt = gcfunc.adamw(0.1, gc="gc")
    params, grads = (sharded(t, sharding) for t in (make_params(), random_like(make_params(), 0)))
    state = opt.init(params)
    with torch.no_grad(), CommDebugMode() as communication:
        opt.step(params, grads, state)
    return communication.get_total_counts()


@pytest.mark.parametrize(("sharding", "count"), [(by_rows, 0), (by_columns, 4), (mixed, 1)])
def test_one_collective_for_each_weight_cut_along_its_rows(
    two: Processes, sharding: Sharding, count: int
) -> None:
    assert two(count_collectives, sharding) == [count, count]


UNITS = gcfunc.Units(dim=1, groups=2)  # a transposed convolution's


def grouped(placement: Placement) -> None:
    weight = torch.randn(6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mesh = init_device_mesh("cpu", (2,))

    def where(name: str, tensor: Tensor) -> gcfunc.Units:
        return UNITS

    want = gcfunc.centralize(weight, where)
    rows = gcfunc.centralize(weight)
    assert largest_difference({"": want}, {"": rows}) > 0.1
    have = gcfunc.centralize(distribute_tensor(weight, mesh, [placement]), where)
    assert have.placements == (placement,)
    assert largest_difference({"": have.full_tensor()}, {"": want}) <= 1e-14


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_groups_that_shards_cut_across(two: Processes, dim: int) -> None:
    two(grouped, Shard(dim))


def trained_in_place(wrap: Callable[[nn.Module], Any], kind: type[Net]) -> None:
    """FSDP2's own parameters, stepped by a donated step."""
    model, alone = make(kind), make(kind)
    wrap(model)
    opt = gcfunc.sgd(0.1, 0.9, weight_decay=0.01, gc="gc")
    step = gcfunc.compile(opt, backend="aot_eager").step
    state = opt.init(dict(model.named_parameters()))
    params = {n: p.detach() for n, p in alone.named_parameters()}
    want = opt.init(params)
    where = places(model)

    def loss(params: Params) -> Tensor:
        images, labels = data()
        return F.cross_entropy(torch.func.functional_call(alone, params, images), labels)

    for _ in range(3):
        model.zero_grad()
        backward(model, *mine(data())[0])
        named = dict(model.named_parameters())
        step(named, {n: p.grad for n, p in named.items()}, state)
        grads = torch.func.grad(loss)(params)
        params, want = opt.step(params, grads, want)
    assert largest_difference(full(dict(model.named_parameters())), params) <= 1e-12
    assert where == places(model)


def places(model: nn.Module) -> list[int]:
    return [p.to_local().data_ptr() for p in model.parameters() if isinstance(p, DTensor)]


def fsdp2(model: nn.Module) -> None:
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(module)
    fully_shard(model)


def test_fsdp2_parameters_stepped_in_place(two: Processes) -> None:
    two(trained_in_place, fsdp2, Net)


def resumed() -> None:
    """From a checkpoint that was sharded alike, otherwise, or not at all."""
    opt = gcfunc.adamw(0.1, gc="gc")
    whole, grads = make_params(), random_like(make_params(), 0)
    whole, state = opt.step(whole, grads, opt.init(whole))
    want, _ = opt.step(whole, grads, state)
    for sharding in (by_rows, by_columns):
        parts = sharded(whole, sharding)
        saved = gcfunc.load_state_dict(opt.init(parts), gcfunc.state_dict(state))
        for other in (by_rows, by_columns):
            params, gs = sharded(whole, other), sharded(grads, other)
            loaded = gcfunc.load_state_dict(opt.init(params), gcfunc.state_dict(saved))
            have, _ = opt.step(params, gs, loaded)
            assert largest_difference(full(have), want) <= 1e-14
        gathered = gcfunc.load_state_dict(opt.init(whole), gcfunc.state_dict(saved))
        have, _ = opt.step(whole, grads, gathered)
        assert all(torch.equal(have[name], want[name]) for name in want)


def packed(sharding: Sharding) -> None:
    """DTensors stay whole in a packed tree, next to ordinary tensors that do not."""
    opt = gcfunc.adamw(0.1, gc="gc")
    whole, grads = make_params(), random_like(make_params(), 0)
    want, _ = opt.step(whole, grads, opt.init(whole))
    params = gcfunc.pack(sharded(whole, sharding))
    for step in (opt.step, gcfunc.compile(opt, backend="eager").step):
        given = gcfunc.pack(sharded(grads, sharding), like=params)
        have, _ = step(params, given, opt.init(params))
        assert largest_difference(full(gcfunc.unpack(have)), want) <= 1e-14


@pytest.mark.parametrize("sharding", [by_columns, mixed])
def test_packed(two: Processes, sharding: Sharding) -> None:
    two(packed, sharding)


def test_checkpoint(two: Processes) -> None:
    two(resumed)


def laid_out_otherwise() -> None:
    """Gradients are laid out as their parameters first."""
    opt = gcfunc.sgd(0.1, gc="gc")
    params, grads = make_params(), random_like(make_params(), 0)
    want, _ = opt.step(params, grads, opt.init(params))
    parts = sharded(params, by_rows)
    mesh = mesh_for(by_rows)
    summands = {
        n: DTensor.from_local(g / 2, mesh, [Partial()], run_check=False) for n, g in grads.items()
    }
    for given in (summands, sharded(grads, by_columns)):
        for step in (opt.step, gcfunc.compile(opt, backend="eager").step):
            start = {n: p.clone() for n, p in parts.items()}
            have, _ = step(start, given, opt.init(parts))
            assert largest_difference(full(have), want) <= 1e-12
            assert all(spread_of(have[n]) == spread_of(parts[n]) for n in parts)


def spread_of(t: Tensor) -> tuple[Placement, ...]:
    assert isinstance(t, DTensor)
    return t.placements


def test_gradients_laid_out_otherwise(two: Processes) -> None:
    two(laid_out_otherwise)


def refused() -> None:
    opt = gcfunc.sgd(0.1, 0.9, gc="gc")
    params, grads = make_params(), random_like(make_params(), 0)
    parts = sharded(params, by_rows)
    state = opt.init(parts)
    before = {n: p.clone() for n, p in parts.items()}
    mesh = init_device_mesh("cpu", (1, 2))
    elsewhere = {
        n: distribute_tensor(g, mesh, [Replicate(), Replicate()]) for n, g in grads.items()
    }
    others = opt.init(sharded(params, by_columns))
    summands = {
        n: DTensor.from_local(p, mesh_for(by_rows), [Partial()], run_check=False)
        for n, p in params.items()
    }
    good = sharded(grads, by_rows)
    for step in (opt.step, gcfunc.compile(opt, backend="eager").step):
        for given, gs, s, error, message in (
            (parts, grads, state, ValueError, "'conv2d.weight' is not a DTensor, but its param"),
            (
                params,
                good,
                opt.init(params),
                ValueError,
                "grads: 'conv2d.weight' is a DTensor over",
            ),
            (parts, elsewhere, state, ValueError, "a DTensor over 1x2 processes"),
            (parts, good, others, ValueError, r"momentum_buffer.*\(0: Shard\(dim=1\)\), but"),
            (parts, good, opt.init(params), ValueError, "momentum_buffer.*is not a DTensor, but"),
            (summands, good, state, TypeError, "params: 'conv2d.weight' is.*yet to be added"),
        ):
            with pytest.raises(error, match=message), torch.no_grad():
                step(given, gs, s)
    with pytest.raises(TypeError, match="yet to be added up"):
        opt.init(summands)
    assert largest_difference(full(parts), full(before)) == 0
    assert int(state.step) == 0


def test_errors(two: Processes) -> None:
    two(refused)
