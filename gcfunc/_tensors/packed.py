"""Packed trees: where each tensor of a tree lies in a few larger ones."""

from __future__ import annotations

from collections.abc import Hashable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """A tensor of the original tree, as it lies in a packed one.

    Attributes:
        names: Its dotted names; tied parameters have more than one.
        shape: Its shape.
        order: Its dimensions from the outermost in memory to the innermost.
        size: How much of the packed tensor's dimension 0 it takes.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    size: int

    def view(self, rows: Tensor) -> Tensor:
        """Its rows of the packed tensor in the original shape and strides."""
        if rows.shape == self.shape and self.order == tuple(range(rows.ndim)):
            return rows
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.reshape([self.shape[dim] for dim in self.order]).permute(back)

    def rows(self, tensor: Tensor, width: Sequence[int]) -> Tensor:
        """The inverse of :meth:`view`; ``width`` is the packed tensor's trailing shape."""
        if tensor.ndim and tensor.shape[1:] == width and self.order == tuple(range(tensor.ndim)):
            return tensor
        return tensor.permute(self.order).reshape(self.size, *width)


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed tree.

    Attributes:
        name: Its name in the packed tree.
        pieces: What it holds, one after the other along dimension 0.
        width: Its shape without dimension 0.
        kept: Whether its only piece keeps its own shape and strides.
    """

    name: str
    pieces: tuple[Piece, ...]
    width: tuple[int, ...]
    kept: bool


def cut(tensor: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """A packed tensor's pieces as views, each in its own shape."""
    if len(pieces) == 1:
        return [pieces[0].view(tensor)]
    # split, not slices: its derivative is one concatenation.
    rows = torch.split(tensor, [piece.size for piece in pieces])
    return [piece.view(own) for piece, own in zip(pieces, rows, strict=True)]


@dataclass(frozen=True)
class Layout:
    """What a packed tree knows besides its tensors.

    Attributes:
        tensors: The packed tensors.
        names: The original tree's dotted names in its order, ties included.
        spec: The original tree's structure; ``None`` for a flat dict.
    """

    tensors: tuple[PackedTensor, ...]
    names: tuple[str, ...]
    spec: Any

    def only(self, names: Sequence[str]) -> Layout:
        """The layout of some of the packed tensors."""
        if len(names) == len(self.tensors):
            return self
        some = tuple(packed for packed in self.tensors if packed.name in names)
        originals = {name for packed in some for piece in packed.pieces for name in piece.names}
        return Layout(some, tuple(name for name in self.names if name in originals), None)

    def originals(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Views of the packed tensors under the original names, in the original order."""
        views: dict[str, Tensor] = {}
        for packed, tensor in zip(self.tensors, tensors, strict=True):
            for piece, view in zip(packed.pieces, cut(tensor, packed.pieces), strict=True):
                views.update(dict.fromkeys(piece.names, view))
        return {name: views[name] for name in self.names}


class Packed(Mapping[str, Tensor]):
    """A tree packed by :func:`gcfunc.pack`: a mapping of names to a few large tensors.

    To functions that take trees (``init``, ``step``, ``torch.func.grad``, ``tree_map``) it is one
    more tree. :func:`gcfunc.unpack` gives the original one.
    """

    __slots__ = ("_tensors", "layout")

    def __init__(self, layout: Layout, tensors: Sequence[Any]) -> None:
        self.layout = layout
        self._tensors: dict[str, Tensor] = {
            packed.name: tensor for packed, tensor in zip(layout.tensors, tensors, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def keys(self) -> KeysView[str]:
        """The names of the packed tensors."""
        return self._tensors.keys()

    def values(self) -> ValuesView[Tensor]:
        """The packed tensors."""
        return self._tensors.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Names and packed tensors."""
        return self._tensors.items()

    # Mapping's own would compare tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Packed({', '.join(self._tensors)}: {len(self.layout.names)} tensors)"


SlotValues = Mapping[str, Tensor]
"""One slot of a state: a tensor for each name."""


def slot_values(layout: Layout | None, tensors: Mapping[str, Tensor]) -> SlotValues:
    """A slot's values for params of this layout, from its tensors by name."""
    if layout is None:
        return dict(tensors)
    layout = layout.only(list(tensors))
    return Packed(layout, [tensors[packed.name] for packed in layout.tensors])


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, packed or not, by their original dotted names."""
    if not isinstance(tensors, Packed):
        return dict(tensors)
    return tensors.layout.originals(list(tensors.values()))


def pack_like(tensors: Mapping[str, Tensor | None], layout: Layout) -> Packed:
    """Pack tensors, given by their original names, in a layout."""
    return Packed(layout, [_gather(packed, tensors) for packed in layout.tensors])


def _gather(packed: PackedTensor, tensors: Mapping[str, Tensor | None]) -> Tensor | None:
    found = [_untied(piece, tensors) for piece in packed.pieces]
    own = [t for t in found if t is not None]
    if not own:
        return None
    for piece, t in zip(packed.pieces, found, strict=True):
        name = piece.names[0]
        if t is None:
            raise ValueError(
                f"{name!r} is None, but others packed with it in {packed.name} are not; "
                "pack only the parameters that get gradients, or give zeros"
            )
        for what, have, want in (
            ("shape", tuple(t.shape), piece.shape),
            ("dtype", t.dtype, own[0].dtype),
            ("device", t.device, own[0].device),
        ):
            if have != want:
                raise ValueError(f"the tree to pack: {name!r} has {what} {have}, expected {want}")
    rows = [piece.rows(t, packed.width) for piece, t in zip(packed.pieces, own, strict=True)]
    # Not cat for a tensor that is kept as it is: it would lose the strides.
    return rows[0].clone() if packed.kept else torch.cat(rows)


def _untied(piece: Piece, tensors: Mapping[str, Tensor | None]) -> Tensor | None:
    """A piece's tensor, which stands under all names of it or is ``None`` under the others."""
    own = [t for t in map(tensors.__getitem__, piece.names) if t is not None]
    if any(memory_of(t) != memory_of(own[0]) for t in own[1:]):
        raise ValueError(
            f"the tree to pack: {', '.join(map(repr, piece.names))} are tied in the packed tree, "
            "but have a tensor each; add up gradients, keep one of other tensors, and give None "
            "for the others"
        )
    return own[0] if own else None


def memory_of(t: Tensor) -> Hashable:
    """The same for two tensors that are one in memory."""
    if t.numel() == 0 or type(t) not in (Tensor, nn.Parameter):
        return id(t)
    try:
        return t.data_ptr(), t.shape, t.stride(), t.dtype
    except RuntimeError:  # torch.func's tensors have no address
        return id(t)
