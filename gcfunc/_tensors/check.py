"""Whether the tensors a user handed in can be stepped on, said before anything is computed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcfunc._tensors import sharding

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensors(names: Sequence[str], leaves: Sequence[Any], what: str) -> None:
    """Raise unless every leaf is a tensor that optimizers can do arithmetic on."""
    if not names:
        raise ValueError(f"{what} holds no tensors (an empty container or an exhausted iterator?)")
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{what}: {name!r} must be a tensor, got {type(leaf).__name__}; {what} is a "
                "pytree of tensors, for example dict(model.named_parameters())"
            )
        if leaf.layout is not torch.strided or leaf.is_nested:
            layout = "nested" if leaf.is_nested else leaf.layout
            raise TypeError(f"{what}: {name!r} has layout {layout}; only strided is supported")
        if sharding.is_partial(leaf) and what == "params":
            raise TypeError(
                f"{what}: {name!r} is {sharding.describe(leaf)}, summands that have yet to be "
                "added up; redistribute it to Shard or Replicate"
            )
        if leaf.is_meta:
            raise TypeError(f"{what}: {name!r} is on the meta device and has no values")
        if leaf.dtype not in FLOATS:
            raise TypeError(
                f"{what}: {name!r} has dtype {leaf.dtype}; supported are "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}"
            )


def require_like(
    what: str, name: str, tensor: Any, param: Tensor, *, sharded: bool = False
) -> None:
    """Raise unless the tensor has its parameter's shape, dtype, device and processes.

    If ``sharded``, each process must also hold the same shard of both.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what}: {name!r} must be a tensor, got {type(tensor).__name__}")
    for what_differs in ("shape", "dtype", "device"):
        have, want = (getattr(t, what_differs) for t in (tensor, param))
        if have != want:
            have, want = (tuple(x) if isinstance(x, torch.Size) else x for x in (have, want))
            raise ValueError(
                f"{what}: {name!r} has {what_differs} {have}, but its parameter has {want}"
            )
    same = sharding.same_sharding if sharded else sharding.same_mesh
    if not same(tensor, param):
        raise ValueError(
            f"{what}: {name!r} is {sharding.describe(tensor)}, but its parameter is "
            f"{sharding.describe(param)}"
        )
