"""Steps written by hand, whose kernels and values are known."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from benchmarks.cuda.fake import fake_cuda
from benchmarks.cuda.generated import Generated, generate

Shape = tuple[int, ...]
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]

PERSISTENT = (16, 576)
LOOPED = (16, 2304)
SPLIT = (4, 20000)
SHAPES = [PERSISTENT, LOOPED, (7, 300), SPLIT]

COMBO = {
    "combo_kernels": True,
    "combo_kernels_autotune": 0,
    "combo_kernel_allow_mixed_sizes": 2,
    # From torch 2.14 it refuses what would raise the peak of memory by 5 %, as it takes a donated
    # step to do.
    "combo_kernel_peak_memory_pct_threshold": None,
}
"""Inductor's options, by which it puts what is independent into one launch."""
COMBO = {name: value for name, value in COMBO.items() if name in torch._inductor.list_options()}


def each(params: list[Tensor], grads: list[Tensor], slots: list[Tensor]) -> None:
    """Momentum with decay and centralization, tensor by tensor."""
    for p, g, m in zip(params, grads, slots, strict=True):
        u = g + 0.1 * p
        new = 0.9 * m + u - u.mean(1, keepdim=True)
        p.copy_(p - 0.1 * new)
        m.copy_(new)


def lists(params: list[Tensor], grads: list[Tensor], slots: list[Tensor]) -> None:
    """The same on lists."""
    us = torch._foreach_add(grads, params, alpha=0.1)
    centered = [u - u.mean(1, keepdim=True) for u in us]
    new = torch._foreach_add(torch._foreach_mul(slots, 0.9), centered)
    results = [*torch._foreach_sub(params, torch._foreach_mul(new, 0.1)), *new]
    for old, result in zip([*params, *slots], results, strict=True):
        old.copy_(result)


def copied_together(params: list[Tensor], grads: list[Tensor], slots: list[Tensor]) -> None:
    """Momentum with decay alone, whose results are copied as lists too."""
    us = torch._foreach_add(grads, params, alpha=0.1)
    new = torch._foreach_add(torch._foreach_mul(slots, 0.9), us)
    results = [*torch._foreach_sub(params, torch._foreach_mul(new, 0.1)), *new]
    torch._foreach_copy_([*params, *slots], results)


@contextmanager
def device() -> Iterator[None]:
    """Tensors on CUDA can be made, and are fake."""
    with fake_cuda(), FakeTensorMode():
        yield


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the device."""
    return torch.empty(shape, device="cuda", dtype=dtype)


def step_on(shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> Lists:
    """Parameters, gradients and slots on the device."""
    first, second, third = ([empty(*s, dtype=dtype) for s in shapes] for _ in range(3))
    return first, second, third


def generate_step(
    function: Callable[..., object], shapes: Sequence[Shape], **kwargs: Any
) -> tuple[Generated, list[Tensor]]:
    """What is generated for a step, and the fake tensors that it is called with."""
    with device():
        given = step_on(shapes)
        return generate(function, *given, **kwargs), tree_leaves(given)
