"""Pytrees as named leaves: the only place that knows how a pytree is walked."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree  # what torch.func walks; torch has no public name for it

from gcfunc._tensors.packed import Layout, Packed

Tree = Any
"""A tensor, or dicts, lists, tuples, NamedTuples and registered containers of trees."""
Labels = Callable[[str, Tensor], Hashable] | Tree
"""A label for each leaf: a function of its name and tensor, or a tree of labels."""


class FlatTree(NamedTuple):
    """A tree taken apart: dotted names, the leaves under them, and the way back.

    Of a packed tree these are the packed tensors; its layout knows the original ones.
    """

    names: list[str]
    leaves: list[Any]
    rebuild: Callable[[Sequence[Any]], Tree]
    layout: Layout | None = None


def flatten(tree: Tree, what: str) -> FlatTree:
    """Take a tree apart; ``what`` is what error messages call it.

    ``{"conv": {"weight": w}}`` has the name ``"conv.weight"``, a NamedTuple's fields go by their
    names, a sequence's items by their position, and a bare tensor is called ``"param"``.
    """
    if type(tree) is dict and all(
        type(name) is str and (leaf is None or isinstance(leaf, Tensor))
        for name, leaf in tree.items()
    ):
        # dict(model.named_parameters()), by far the commonest tree, three times as fast.
        names = list(tree)
        return FlatTree(
            names, list(tree.values()), lambda leaves: dict(zip(names, leaves, strict=True))
        )
    if isinstance(tree, Packed):
        layout = tree.layout
        return FlatTree(
            list(tree), list(tree.values()), lambda leaves: Packed(layout, leaves), layout
        )
    paths, spec = pytree.tree_flatten_with_path(tree, is_leaf=_is_packed)
    if any(_is_packed(leaf) for _, leaf in paths):
        raise TypeError(f"{what}: a packed tree cannot be part of another; pack the whole")
    names = [".".join(map(_step, path)) or "param" for path, _ in paths]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{what}: two leaves have the name {', '.join(map(repr, twice))}")
    return FlatTree(
        names, [leaf for _, leaf in paths], lambda leaves: pytree.tree_unflatten(leaves, spec)
    )


def leaves_like(
    tree: Tree, names: Sequence[str], what: str, like: str, layout: Layout | None = None
) -> list[Any]:
    """The leaves of ``tree`` in the order of ``names``, which it must have exactly.

    If ``layout`` is given, it must be packed like that.
    """
    flat = flatten(tree, what)
    if flat.layout != layout:
        raise ValueError(
            f"{what} and {like} must be packed alike or not at all; "
            f"gcfunc.pack({what}, like={like}) does so"
        )
    if flat.names == names:
        return flat.leaves
    if len(flat.leaves) == 1 and flat.leaves[0] is tree:
        raise TypeError(
            f"{what} must have the structure of {like} (leaves {_list(names)}), got a bare "
            f"{type(tree).__name__}"
        )
    require_names(flat.names, names, what, like)
    leaves = dict(zip(flat.names, flat.leaves, strict=True))
    return [leaves[name] for name in names]


def labels_of(labels: Labels, names: Sequence[str], leaves: Sequence[Tensor]) -> list[Any]:
    """The label of each leaf."""
    if is_function(labels):
        return [labels(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    return leaves_like(labels, names, "labels", "params")


def spec_of(tree: Tree) -> Any:
    """A tree's structure for :func:`of_spec`; ``None`` for a flat dict of tensors."""
    # The commonest tree needs none, and torch's warns where it is copied or pickled.
    if type(tree) is dict and all(isinstance(leaf, Tensor) for leaf in tree.values()):
        return None
    return pytree.tree_structure(tree)


def of_spec(spec: Any, leaves: dict[str, Tensor]) -> Tree:
    """The tree of a structure, from its leaves in their order."""
    return leaves if spec is None else pytree.tree_unflatten(list(leaves.values()), spec)


def leaves_of(tree: Tree) -> list[Any]:
    """The leaves alone."""
    return pytree.tree_leaves(tree)


def mapped(function: Callable[..., Any], *trees: Tree) -> Tree:
    """The tree of what a function makes of the leaves, those at one place of all trees together."""
    return pytree.tree_map(function, *trees)


def is_function(spec: Any) -> bool:
    """Whether a user who may give a function or a tree gave a function."""
    # Dynamo can trace neither callable() of a dict nor the union of types in isinstance.
    return not isinstance(spec, (dict, list, tuple)) and callable(spec)


def require_names(have: Sequence[str], want: Sequence[str], what: str, like: str) -> None:
    """Raise ValueError unless the two hold the same names, saying which differ."""
    missing, extra = sorted({*want} - {*have}), sorted({*have} - {*want}, key=repr)
    if missing or extra:
        said = [f"{what} does not match {like}"]
        said += [f"missing {_list(missing)}"] if missing else []
        said += [f"unexpected {_list(extra)}"] if extra else []
        raise ValueError("; ".join(said))


def _is_packed(tree: Tree) -> bool:
    return isinstance(tree, Packed)


def _step(key: Any) -> str:
    match key:
        case pytree.MappingKey():
            return str(key.key)
        case pytree.SequenceKey():
            return str(key.idx)
        case pytree.GetAttrKey():
            return key.name
    return str(key)


def _list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


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
