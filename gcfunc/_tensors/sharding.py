"""Tensors of which each process holds a shard: the DTensors of FSDP2 and tensor parallel.

Stepping is elementwise but for the mean over a row, so it works on shards. Processes talk
only where a dimension that a mean runs over is sharded, and to lay out a gradient as its parameter
is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

AVAILABLE = dist.is_available()
"""Whether torch was built with distributed."""

if TYPE_CHECKING or AVAILABLE:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor


def is_dtensor(t: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor."""
    return AVAILABLE and isinstance(t, DTensor)


def any_dtensors(tensors: Sequence[Any]) -> bool:
    """:func:`is_dtensor` for any of them, at the price of one pass over their types."""
    return AVAILABLE and any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def local(t: Tensor) -> Tensor:
    """The shard of a DTensor that this process holds; any other tensor itself."""
    return t.to_local() if is_dtensor(t) else t


def local_like(t: Tensor, like: Tensor) -> Tensor:
    """:func:`local`, of a DTensor first laid out as ``like`` is."""
    if is_dtensor(t) and is_dtensor(like) and t.placements != like.placements:
        t = t.redistribute(placements=like.placements)
    return local(t)


def from_shard(shard: Tensor, like: Tensor) -> Tensor:
    """The DTensor of these shards, laid out as ``like`` is; if that is none, the tensor itself."""
    if not is_dtensor(like):
        return shard
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def spread(t: Tensor, like: Tensor) -> Tensor:
    """The same values spread over processes as ``like`` is, whichever of the two is a DTensor.

    Without a DTensor, each process has to have ``t`` whole.
    """
    if is_dtensor(t):
        if is_dtensor(like) and same_mesh(t, like):
            return t.redistribute(placements=like.placements)
        t = t.full_tensor()
    if is_dtensor(like):
        return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)
    return t


def describe(t: object) -> str:
    """How a tensor is spread over processes, for messages."""
    if not is_dtensor(t):
        return "not a DTensor"
    axes = t.device_mesh.mesh_dim_names or range(t.device_mesh.ndim)
    cuts = ", ".join(f"{axis}: {p!r}" for axis, p in zip(axes, t.placements, strict=True))
    size = "x".join(map(str, t.device_mesh.shape))
    return f"a DTensor over {size} processes ({cuts})"


def is_partial(t: Tensor) -> bool:
    """Whether the shards are summands that have yet to be added up."""
    return is_dtensor(t) and any(placement.is_partial() for placement in t.placements)


def same_mesh(a: Tensor, b: Tensor) -> bool:
    """Whether both are DTensors of the same processes, or neither is one."""
    if is_dtensor(a) and is_dtensor(b):
        return bool(a.device_mesh == b.device_mesh)
    return is_dtensor(a) == is_dtensor(b)


def same_sharding(a: Tensor, b: Tensor) -> bool:
    """Whether processes hold the same shards of both."""
    if is_dtensor(a) and is_dtensor(b):
        return same_mesh(a, b) and a.placements == b.placements
    return same_mesh(a, b)


@dataclass(frozen=True)
class Shards:
    """How a tensor is cut up, as seen by a process that holds one shard."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, t: DTensor) -> Shards:
        """Those of a DTensor."""
        return cls(t.device_mesh, t.placements, t.shape, t.stride())

    def cut(self, dims: list[int]) -> list[int]:
        """The dimensions of the mesh along which one of the tensor's ``dims`` is cut."""
        # Not isinstance(placement, Shard): the strided shards of FSDP2 over tensor parallel are
        # of a class of their own.
        return [i for i, p in enumerate(self.placements) if getattr(p, "dim", None) in dims]

    def mean(self, shard: Tensor, dims: list[int], keepdim: bool) -> Tensor:
        """The whole tensor's mean over some of its dimensions, as far as it concerns this shard.

        One all-reduce of a sum along each dimension of the mesh that cuts one of them. Shards
        may differ in size.
        """
        cut = self.cut(dims)
        summands = [Partial() if i in cut else Replicate() for i in range(self.mesh.ndim)]
        sums = DTensor.from_local(
            shard.sum(dims, keepdim=keepdim), self.mesh, summands, run_check=False
        )
        total = sums.redistribute(placements=[Replicate()] * self.mesh.ndim)
        # Each process takes it from its own shard alone: the derivatives have to be added up.
        return total.to_local(grad_placements=summands) / math.prod([self.shape[d] for d in dims])

    def gathered(
        self, shard: Tensor, dims: list[int], function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """This shard of what ``function`` makes of the tensor, ``dims`` of which it gets uncut."""
        t = DTensor.from_local(
            shard, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        cut = self.cut(dims)
        uncut = t.redistribute(
            placements=[Replicate() if i in cut else p for i, p in enumerate(self.placements)]
        )
        result = DTensor.from_local(
            function(uncut.to_local()),
            self.mesh,
            uncut.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )
        return result.redistribute(placements=self.placements).to_local()
