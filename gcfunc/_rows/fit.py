"""Where there is a row kernel, and what it can take."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

DEVICES = ("cuda",)
"""Kinds of devices with row kernels."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LONGEST = 2**18
"""A longer row takes one program too long."""

MOST = 2**31
"""So many rows are not to be counted in 32 bits."""


@cache
def has_triton() -> bool:
    """Whether triton is installed, as it is with torch for CUDA."""
    return importlib.util.find_spec("triton") is not None


def is_for(device: torch.device) -> bool:
    """Whether there is a row kernel for tensors there."""
    return device.type in DEVICES and has_triton()


def is_anywhere() -> bool:
    """Whether there is one for tensors on any device of this machine."""
    return has_triton() and any(torch.get_device_module(d).is_available() for d in DEVICES)


def order(t: Tensor) -> list[tuple[int, int]]:
    """How a tensor lies in memory: where a size is 1, a stride says nothing."""
    return [(size, step) for size, step in zip(t.shape, t.stride(), strict=True) if size > 1]


def without_gaps(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie in memory alike, and without gaps."""
    first, extent = tensors[0], 1
    if all(t.is_contiguous() for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False  # sizes may be symbols, which cannot be sorted
    if any(order(t) != order(first) for t in tensors):
        return False
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size > 1 and stride != extent:
            return False
        extent *= size
    return True


def in_rows(tensors: Sequence[Tensor]) -> bool:
    """Whether, besides, all that belongs to one index of dimension 0 lies together."""
    first = tensors[0]
    if not without_gaps(tensors) or first.numel() == 0:
        return first.numel() == 0
    width = first.numel() // first.shape[0]
    outermost = first.shape[0] == 1 or first.stride(0) == width
    return width <= LONGEST and first.shape[0] < MOST and outermost
