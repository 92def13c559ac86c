"""What a donated step may meet on a device: odd gradients, other states, 16 bits, no waiting."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gcfunc
from tests.cases import ALGORITHMS, Params
from tests.gpu.cases import (
    BACKWARD,
    STEPS,
    changed,
    distance,
    each,
    everything,
    expected,
    gradients,
    moved,
    require,
    scalars_on_the_cpu,
    weights,
    wide,
)

each_kind = pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "ranger"])


def reference(name: str, start: Params, batches: list[dict[str, Any]]) -> tuple[Params, Params]:
    """With GC and without."""
    with_gc, without = (expected(ALGORITHMS[name](gc), start, batches) for gc in (BACKWARD, None))
    return with_gc, without


def in_one_buffer(grads: Params, device: str, shift: int) -> Params:
    """Views at whatever addresses, as of DDP's buckets (``gradient_as_bucket_view``)."""
    buffer = torch.empty(shift + sum(g.numel() for g in grads.values()), device=device)
    views, at = {}, shift
    for name, g in grads.items():
        views[name] = buffer[at : at + g.numel()].as_strided(g.shape, g.stride(), at)
        views[name].copy_(g)
        at += g.numel()
    return views


@each_kind
def test_gradients_at_any_address(name: str, device: str) -> None:
    """Of every remainder by 16 bytes, which is what kernels like to load at once."""
    start = weights()
    batches = [gradients(start, seed) for seed in range(STEPS)]
    opt, params = gcfunc.compile(ALGORITHMS[name](BACKWARD)), moved(start, device)
    state = opt.init(params)
    remainders = set()
    for shift, grads in enumerate(batches):
        own = in_one_buffer(grads, device, shift)
        remainders |= {g.data_ptr() % 16 for g in own.values()}
        opt.step(params, own, state)
    assert remainders == {0, 4, 8, 12}
    require(everything(params, state), *reference(name, start, batches))


@each_kind
def test_missing_gradients(name: str, device: str) -> None:
    """Others in each step, and at last all that there are."""
    start = weights()
    batches: list[dict[str, Any]] = [gradients(start, seed) for seed in range(STEPS)]
    for key in ("rows of 64", "vector", "turned"):
        batches[0][key] = batches[2][key] = None
    batches[1]["filters"] = None
    opt, params = gcfunc.compile(ALGORITHMS[name](BACKWARD)), moved(start, device)
    state = opt.init(params)
    for grads in batches:
        opt.step(params, moved(grads, device), state)
    require(everything(params, state), *reference(name, start, batches))


@each_kind
def test_in_place(name: str, device: str) -> None:
    start = weights()
    opt, params = gcfunc.compile(ALGORITHMS[name](BACKWARD)), moved(start, device)
    state = opt.init(params)
    own = [*params.values(), state.step, *(t for s in state.slots.values() for t in s.values())]
    places = [t.data_ptr() for t in own]
    before = everything(params, state)
    for seed in range(2):
        returned, after = opt.step(params, moved(gradients(start, seed), device), state)
        assert returned is params
        assert after is state
    assert [t.data_ptr() for t in own] == places
    assert distance(everything(params, state), before) > 1e-3
    assert int(state.step) == 2


@each_kind
def test_a_state_of_the_cpu(name: str, device: str) -> None:
    """Its scalars there, and all of it there, as a checkpoint has it."""
    start = weights()
    batches = [gradients(start, seed) for seed in range(STEPS)]
    opt, params = gcfunc.compile(ALGORITHMS[name](BACKWARD)), moved(start, device)
    state = scalars_on_the_cpu(opt.init(params))
    for grads in batches[:2]:
        opt.step(params, moved(grads, device), state)
    saved = moved(gcfunc.state_dict(state), "cpu")
    state = gcfunc.load_state_dict(opt.init(params), saved)
    for grads in batches[2:]:
        opt.step(params, moved(grads, device), state)
    require(everything(params, state), *reference(name, start, batches))


def test_slots_on_the_cpu_are_refused(device: str) -> None:
    if device == "cpu":
        pytest.skip("there they belong")
    params = moved(weights(), device)
    opt = gcfunc.compile(gcfunc.adamw(0.01, gc="gc"))
    state = changed(opt.init(params), Tensor.cpu)
    before = moved(params, "cpu")
    with pytest.raises(ValueError, match="device"):
        opt.step(params, moved(gradients(weights(), 0), device), state)
    assert all(torch.equal(p.cpu(), before[name]) for name, p in params.items())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_kind
def test_16_bits(
    name: str, dtype: torch.dtype, compiled: bool, device: str, interpreted: bool
) -> None:
    """Each step is the wide one rounded once, params and slots."""
    # Triton's interpreter cuts bfloat16 off where the device rounds it to the nearest.
    most = 1.02 if interpreted and dtype is torch.bfloat16 else 0.51
    opt, plain = ALGORITHMS[name](BACKWARD), ALGORITHMS[name](None)
    params = moved(weights(dtype), device)
    state = opt.init(params)
    step = gcfunc.compile(opt).step if compiled else opt.step
    for seed in range(STEPS):
        grads = gradients(weights(dtype), seed)
        own = each(wide, params), each(wide, grads), scalars_on_the_cpu(changed(state, wide))
        want, without = everything(*opt.step(*own)), everything(*plain.step(*own))
        params, state = step(params, moved(grads, device), state)
        have = everything(params, state)
        for key, t in want.items():
            # Half a unit in the last place, and a bit of float32's own.
            allowed = most * torch.finfo(dtype).eps * t.abs() + 1e-6
            assert bool(((have[key] - t).abs() <= allowed).all()), key
        assert distance(want, without) > 1e-3


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """An error from whatever makes the CPU wait for the device."""
    if device != "cpu":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")


@each_kind
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_does_not_wait_for_the_device(name: str, packed: bool, device: str) -> None:
    start = weights()
    opt = gcfunc.compile(ALGORITHMS[name](BACKWARD))
    params: Any = moved(start, device)
    grads: Any = moved(gradients(start, 0), device)
    if packed:
        params = gcfunc.pack(params)
        grads = gcfunc.pack(grads, like=params)
    state = opt.init(params)
    opt.step(params, grads, state)
    before = everything(params, state)
    with no_waiting(device):
        opt.step(params, grads, state)
        opt.step(params, grads, state)
    assert distance(everything(params, state), before) > 1e-3


def test_a_drop_in_does_not_wait_for_the_device(device: str) -> None:
    params = {key: nn.Parameter(p) for key, p in moved(weights(), device).items()}
    for key, g in moved(gradients(weights(), 0), device).items():
        params[key].grad = g
    optimizer = gcfunc.optim.AdamW(params.items(), 0.01, gc=BACKWARD, compile=True)
    optimizer.step()
    before = each(wide, params)
    with no_waiting(device):
        optimizer.step()
        optimizer.step()
    assert distance(each(wide, params), before) > 1e-3
