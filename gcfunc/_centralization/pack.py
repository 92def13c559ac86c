"""Rows of equal width gathered into matrices: a model as a few large tensors."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from gcfunc._centralization.where import rules_apart
from gcfunc._tensors import trees
from gcfunc._tensors.check import require_tensors
from gcfunc._tensors.packed import (
    Layout,
    Packed,
    PackedTensor,
    Piece,
    memory_of,
    pack_like,
    unpacked,
)
from gcfunc._tensors.trees import Labels, Tree


def pack(
    params: Tree | nn.Module, *, like: Packed | None = None, labels: Labels | None = None
) -> Packed:
    r"""Gather tensors into a few large ones.

    GC acts on rows: the row of a weight of shape :math:`(n, d_1, d_2, \dots)` is one output unit's
    :math:`K = d_1 d_2 \cdots` numbers. All rows of one width are the same problem, so the weights
    of width :math:`K` become one matrix of shape :math:`(\sum n, K)`, and vectors and scalars one
    flat vector; each for itself by device and dtype, and convolution weights apart from the others,
    so that ``"gcc"`` selects whole matrices. A step then has few tensors to walk and to compile
    for, whatever the depth of the model.

    ``init``, ``step``, :func:`gcfunc.centralize` and :func:`gcfunc.compile` take the packed tree as
    they take any other, with the same results; ``where`` and ``labels`` are still asked about the
    original names and tensors. A checkpoint made by :func:`gcfunc.state_dict` has the original
    names, and loads packed or not.
    Gradients taken with respect to a packed tree (``torch.func.grad``) arrive packed.

    Args:
        params: A pytree of tensors; nothing in it is written. Tensors that are the same memory,
            such as tied parameters, are packed once. Rows are stored in the order they have in
            memory, so that channels_last weights stay so. A tensor whose dimension 0 is not the
            outermost in memory is copied as it is.

            Or a module: the packed parameters are those that require grad, and the module's own
            become views of them, so that a donated step moves the module. What gives a module new
            storage (``to``, ``half``, ``load_state_dict(assign=True)``, ``deepcopy``) ends that.
        like: Pack in the layout of this tree instead, as gradients must be. Tied parameters have
            one gradient: under one of their names with ``None`` under the others, or the same
            tensor under all. Differentiable.
        labels: As given to :func:`gcfunc.partition`: tensors of different labels share no matrix.

    Returns:
        The packed tree, a copy: a mapping from names that tell dtype and shape to its few tensors.

    Raises:
        TypeError: a leaf is no strided tensor of a supported dtype, or ``like`` is not packed.
        ValueError: there are no tensors; or they do not match ``like`` in names or shapes, those of
            one matrix differ in dtype or device or are ``None`` in part, or tied ones differ.

    Example:
        >>> import torch, gcfunc
        >>> params = {"a": torch.zeros(2, 3), "b": torch.ones(4, 3), "c": torch.ones(4)}
        >>> packed = gcfunc.pack(params)
        >>> {name: tuple(tensor.shape) for name, tensor in packed.items()}
        {'float32[6, 3]': (6, 3), 'float32[4]': (4,)}
        >>> gcfunc.unpack(packed)["a"].fill_(2.0)
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
        >>> packed["float32[6, 3]"].sum()
        tensor(24.)
    """
    if like is not None:
        if not isinstance(like, Packed):
            raise TypeError(f"like must be a tree packed before, got {type(like).__name__}")
        if labels is not None:
            raise TypeError("labels is decided by like already; give one of the two")
        leaves = trees.leaves_like(params, like.layout.names, "the tree to pack", "like")
        given = [i for i, leaf in enumerate(leaves) if leaf is not None]
        if given:
            names = [like.layout.names[i] for i in given]
            require_tensors(names, [leaves[i] for i in given], "the tree to pack")
        return pack_like(dict(zip(like.layout.names, leaves, strict=True)), like.layout)
    if isinstance(params, nn.Module):
        own = {name: p for name, p in params.named_parameters() if p.requires_grad}
        packed = pack(own, labels=labels)
        with torch.no_grad():
            for name, view in unpack(packed).items():
                own[name].data = view
        return packed
    flat = trees.flatten(params, "params")
    require_tensors(flat.names, flat.leaves, "params")
    layout = _layout(params, flat, labels)
    with torch.no_grad():
        return pack_like(dict(zip(flat.names, flat.leaves, strict=True)), layout)


def unpack(packed: Packed) -> Tree:
    """The original tree of a packed one, made of views of it.

    Args:
        packed: What :func:`pack` made, or ``torch.func.grad`` or ``tree_map`` of it.

    Returns:
        The tree that was packed: same structure, names, shapes and strides, fit for
        ``gcfunc.functional_call``. Writing its tensors writes the packed ones.

    Raises:
        TypeError: ``packed`` is not packed.

    Example:
        >>> import torch, gcfunc
        >>> packed = gcfunc.pack({"weight": torch.eye(2), "bias": torch.ones(2)})
        >>> layer, x = torch.nn.Linear(2, 2), torch.tensor([[1.0, 2.0]])
        >>> def loss(packed):
        ...     return gcfunc.functional_call(layer, gcfunc.unpack(packed), x).sum()
        >>> gcfunc.unpack(torch.func.grad(loss)(packed))["weight"]
        tensor([[1., 2.],
                [1., 2.]])
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must come from gcfunc.pack, got {type(packed).__name__}")
    return trees.of_spec(packed.layout.spec, unpacked(packed))


def _layout(params: Tree, flat: trees.FlatTree, labels: Labels | None) -> Layout:
    given = [None] * len(flat.names)
    if labels is not None:
        given = trees.labels_of(labels, flat.names, flat.leaves)
    names: dict[Hashable, list[str]] = {}
    alike: dict[Hashable, list[Tensor]] = {}
    for name, t, label in zip(flat.names, flat.leaves, given, strict=True):
        names.setdefault(memory_of(t), []).append(name)
        if len(names[memory_of(t)]) == 1:
            alone = None if _has_rows(t) else name
            width = t.shape[1:].numel() if t.ndim > 1 else None
            kind = label, alone, t.device, t.dtype, width, rules_apart(t)
            alike.setdefault(kind, []).append(t)
    tensors: dict[str, PackedTensor] = {}
    for ts in alike.values():
        kept = not _has_rows(ts[0])
        pieces = tuple(
            Piece(
                tuple(names[memory_of(t)]),
                tuple(t.shape),
                tuple(range(t.ndim)) if kept else _order(t),
                t.shape[0] if t.ndim else 1,
            )
            for t in ts
        )
        width = () if ts[0].ndim < 2 else ts[0].shape[1:] if kept else (ts[0][0].numel(),)
        shape = [sum(piece.size for piece in pieces), *width]
        name = pieces[0].names[0] if kept else f"{_show(ts[0].dtype)}{shape}"
        while name in tensors:
            name += "'"
        tensors[name] = PackedTensor(name, pieces, tuple(width), kept)
    return Layout(tuple(tensors.values()), tuple(flat.names), trees.spec_of(params))


def _has_rows(t: Tensor) -> bool:
    """Whether dimension 0 is the outermost in memory, or would be without gaps."""
    if type(t) not in (Tensor, nn.Parameter):
        return False
    return t.ndim < 2 or 0 < t.numel() == t.shape[0] * torch.empty_like(t, device="meta").stride(0)


def _order(t: Tensor) -> tuple[int, ...]:
    strides = torch.empty_like(t, device="meta").stride()
    # Dimensions of size 1 come last among equals, so that a view gives them the same stride back.
    rest = sorted(range(1, t.ndim), key=lambda dim: (-strides[dim], t.shape[dim] == 1))
    return (0, *rest) if t.ndim else ()


def _show(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
