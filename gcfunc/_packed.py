"""Packed trees: where each tensor of a tree lies in a few larger ones."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # what torch.func walks; torch has no public name for it


@dataclass(frozen=True)
class Member:
    """A tensor of the original tree, as a piece of a packed one.

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

    def view(self, piece: Tensor) -> Tensor:
        """The piece in its original shape and strides."""
        if piece.shape == self.shape and self.order == tuple(range(piece.ndim)):
            return piece
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return piece.reshape([self.shape[dim] for dim in self.order]).permute(back)

    def flat(self, tensor: Tensor, width: Sequence[int]) -> Tensor:
        """The inverse of :meth:`view`; ``width`` is the packed tensor's trailing shape."""
        if tensor.ndim and tensor.shape[1:] == width and self.order == tuple(range(tensor.ndim)):
            return tensor
        return tensor.permute(self.order).reshape(self.size, *width)


@dataclass(frozen=True)
class Leaf:
    """One tensor of a packed tree.

    Attributes:
        name: Its name in the packed tree.
        members: What it holds, one after the other along dimension 0.
        width: Its shape without dimension 0.
        whole: Whether its only member keeps its own shape and strides.
    """

    name: str
    members: tuple[Member, ...]
    width: tuple[int, ...]
    whole: bool


def cut(tensor: Tensor, members: Sequence[Member]) -> list[Tensor]:
    """A packed tensor's members as views, each in its own shape."""
    if len(members) == 1:
        return [members[0].view(tensor)]
    # split, not slices: its derivative is one concatenation.
    pieces = torch.split(tensor, [member.size for member in members])
    return [member.view(piece) for member, piece in zip(members, pieces, strict=True)]


@dataclass(frozen=True)
class Layout:
    """What a packed tree knows besides its tensors.

    Attributes:
        leaves: The packed tensors.
        names: The original tree's dotted names in its order, ties included.
        spec: The original tree's structure; ``None`` for a flat dict.
    """

    leaves: tuple[Leaf, ...]
    names: tuple[str, ...]
    spec: Any

    def only(self, leaves: Sequence[str]) -> Layout:
        """The layout of some of the leaves."""
        if len(leaves) == len(self.leaves):
            return self
        kept = tuple(leaf for leaf in self.leaves if leaf.name in leaves)
        members = {name for leaf in kept for member in leaf.members for name in member.names}
        return Layout(kept, tuple(name for name in self.names if name in members), None)

    def originals(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Views of the packed tensors under the original names, in the original order."""
        views: dict[str, Tensor] = {}
        for leaf, tensor in zip(self.leaves, tensors, strict=True):
            for member, view in zip(leaf.members, cut(tensor, leaf.members), strict=True):
                views.update(dict.fromkeys(member.names, view))
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
            leaf.name: tensor for leaf, tensor in zip(layout.leaves, tensors, strict=True)
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


Column = Mapping[str, Tensor]
"""One slot of a state: a tensor for each name."""


def column_like(layout: Layout | None, tensors: Mapping[str, Tensor]) -> Column:
    """A slot's column for params of this layout, from its tensors by name."""
    if layout is None:
        return dict(tensors)
    layout = layout.only(list(tensors))
    return Packed(layout, [tensors[leaf.name] for leaf in layout.leaves])


def _flatten(packed: Packed) -> tuple[list[Any], Layout]:
    return list(packed.values()), packed.layout


def _flatten_with_keys(packed: Packed) -> tuple[list[tuple[pytree.KeyEntry, Any]], Layout]:
    return [(pytree.MappingKey(name), t) for name, t in packed.items()], packed.layout


def _unflatten(tensors: Any, layout: Layout) -> Packed:
    return Packed(layout, list(tensors))


pytree.register_pytree_node(
    Packed,
    _flatten,
    _unflatten,
    serialized_type_name="gcfunc.Packed",
    flatten_with_keys_fn=_flatten_with_keys,
)
