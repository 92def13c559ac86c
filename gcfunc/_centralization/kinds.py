"""The formula on tensors as they come: of 16 bits, packed, and sharded over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcfunc._centralization.formula import ROWS, Projection, Units, project
from gcfunc._rows.alone import on_rows
from gcfunc._tensors import sharding
from gcfunc._tensors.lists import compute_dtype, transformed
from gcfunc._tensors.packed import PackedTensor, Piece, cut
from gcfunc._tensors.sharding import Shards


@dataclass(frozen=True)
class PackedUnits(Projection):
    """Units of a packed tensor whose pieces differ in theirs."""

    pieces: tuple[tuple[Piece, Units | None], ...]

    def project(self, g: Tensor) -> Tensor:
        """``g`` centralized, each piece by itself."""
        pieces, units = zip(*self.pieces, strict=True)
        gs = centralize_list(cut(g, pieces), units)
        return torch.cat([piece.rows(t, g.shape[1:]) for piece, t in zip(pieces, gs, strict=True)])


@dataclass(frozen=True)
class ShardedUnits(Projection):
    """Units that are spread over processes, each of which projects its shard."""

    units: Units
    shards: Shards
    communicates: ClassVar[bool] = True

    def project(self, g: Tensor) -> Tensor:
        """``g``, a shard, centralized as if it were whole."""
        inputs = self.units.inputs(g.ndim)
        if self.units.groups > 1:
            # Blocks and shards need not begin at the same rows.
            return self.shards.gathered(g, inputs, self.units.project)
        return project(g, inputs, self.shards.mean)


def of_tensor(units: Units, t: Tensor) -> Units | ShardedUnits:
    """How what this process holds of a tensor is centralized."""
    if not sharding.is_dtensor(t):
        return units
    shards = Shards.of(t)
    # Where no mean runs over a dimension that is cut, each process has its units to itself.
    return ShardedUnits(units, shards) if shards.cut(units.inputs(t.ndim)) else units


def of_packed(packed: PackedTensor, t: Tensor, units: Sequence[Units | None]) -> Projection | None:
    """How a packed tensor is centralized, from the units of its pieces."""
    first, as_it_is = units[0], t.shape == packed.pieces[0].shape
    if all(u == first for u in units) and (first in (None, ROWS) or as_it_is):
        return first and of_tensor(first, t)
    pieces: list[tuple[Piece, Units | None]] = []
    for piece, own in zip(packed.pieces, units, strict=True):
        if own in (None, ROWS):
            # Rows are rows, whatever weights they come from.
            rows = piece.size
            if pieces and pieces[-1][1] == own:
                rows += pieces.pop()[0].size
            piece = Piece((), (rows, *t.shape[1:]), tuple(range(t.ndim)), rows)
        pieces.append((piece, own))
    return PackedUnits(tuple(pieces))


def centralize_list(gs: Sequence[Tensor], projections: Sequence[Projection | None]) -> list[Tensor]:
    """A list of gradients centralized; ``None`` leaves one as it is."""
    return [
        g if projection is None else centralize_one(g, projection)
        for g, projection in zip(gs, projections, strict=True)
    ]


def centralize_one(g: Tensor, projection: Projection) -> Tensor:
    """A gradient centralized: computed in float32 if it has 16 bits, and rounded once."""
    if sharding.is_dtensor(g):
        return sharding.from_shard(centralize_one(sharding.local(g), projection), like=g)
    if projection == ROWS and not (g.requires_grad or transformed()):
        centralized = on_rows(_row_by_row, g)
        if centralized is not None:
            return centralized
    wide = compute_dtype(g.dtype)
    if g.dtype is wide:
        return projection.project(g)
    return projection.project(g.to(wide)).to(g.dtype)


def _row_by_row(tensors: list[Tensor], _: list[Tensor]) -> list[Tensor]:
    return [centralize_one(g, ROWS) for g in tensors]
