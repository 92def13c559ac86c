"""The formula of gradient centralization, and which leaves it applies to.

Gradient centralization (Yong et al. 2020, https://arxiv.org/abs/2004.01461) projects the gradient
of each output unit's weights onto the hyperplane of zero mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gcfunc import _sharding, _tree
from gcfunc._check import require_tensors
from gcfunc._foreach import compute_dtype
from gcfunc._packed import Leaf, Member, cut
from gcfunc._sharding import Shards
from gcfunc._tree import Flat, Tree


@dataclass(frozen=True)
class Units:
    """Which entries of a weight belong to one output unit.

    Args:
        dim: The dimension that counts output units. 0 for Linear and Conv weights, 1 for
            transposed convolutions, whose dimension 0 is the input.
        groups: Into how many equal blocks dimension 0 falls, each with output units of its own:
            a transposed convolution's ``groups``. A forward convolution keeps 1 whatever its
            groups, because each of its rows already is one unit.

    Example:
        >>> import torch, gcfunc
        >>> g = torch.arange(6.0).reshape(2, 3)
        >>> gcfunc.centralize(g, where=lambda name, tensor: gcfunc.Units(dim=1))
        tensor([[-1.5000, -1.5000, -1.5000],
                [ 1.5000,  1.5000,  1.5000]])
    """

    dim: int = 0
    groups: int = 1

    def fit(self, weight: Tensor) -> bool:
        """Whether a weight of at least 2 dimensions can be cut up like this."""
        return (
            0 <= self.dim < weight.ndim and self.groups >= 1 and weight.shape[0] % self.groups == 0
        )


ROWS = Units()


@dataclass(frozen=True)
class Stack:
    """Units of a packed matrix whose members differ in theirs: its parts, one after the other."""

    parts: tuple[tuple[Member, Units | None], ...]

    def project(self, g: Tensor) -> Tensor:
        """:func:`project` for each part."""
        members, units = zip(*self.parts, strict=True)
        gs = centralize_list(cut(g, members), units)
        return torch.cat([m.flat(t, g.shape[1:]) for m, t in zip(members, gs, strict=True)])


@dataclass(frozen=True)
class Sharded:
    """Units that are spread over processes, each of which projects the part it holds."""

    units: Units
    shards: Shards

    def project(self, g: Tensor) -> Tensor:
        """:func:`project` for this part."""
        if self.units.groups > 1:
            # Blocks and shards need not begin at the same rows.
            dims = [dim for dim in range(g.ndim) if dim != self.units.dim]
            return self.shards.gathered(g, dims, lambda g: project(g, self.units))
        return _less_mean(g, keep=(self.units.dim,), mean=self.shards.mean)


Unit = Units | Stack | Sharded
"""How one leaf is centralized."""

Predicate = Callable[[str, Tensor], "bool | Units"]
Where = Literal["gc", "gcc"] | Predicate | Tree
"""``"gc"``, ``"gcc"``, a predicate, or a pytree of bools (or :class:`Units`) matching params."""

MIN_DIMS = {"gc": 2, "gcc": 4}
"""The reference's rule: every weight, or convolution weights, told by their dimensions."""


def project(g: Tensor, units: Unit = ROWS) -> Tensor:
    """The formula: ``g`` less its mean over all dimensions but the output unit's."""
    if isinstance(units, (Stack, Sharded)):
        return units.project(g)
    if units.groups > 1:
        blocks = g.reshape(units.groups, g.shape[0] // units.groups, *g.shape[1:])
        return _less_mean(blocks, keep=(0, units.dim + 1)).reshape(g.shape)
    return _less_mean(g, keep=(units.dim,))


def _less_mean(
    g: Tensor, keep: tuple[int, ...], mean: Callable[..., Tensor] = torch.mean
) -> Tensor:
    return g - mean(g, [dim for dim in range(g.ndim) if dim not in keep], keepdim=True)


def centralize(tree: Tree, where: Where = "gc") -> Tree:
    r"""Centralize gradients: subtract from each its mean over all dimensions but the first.

    For a gradient :math:`G` of shape ``(units, K)`` (a convolution's trailing dimensions count as
    one) this is the projection

    .. math:: \Phi(G) = G - \tfrac1K\, G\, e e^\top = (I - \tfrac1K e e^\top)\ \text{on each row}

    It is linear and idempotent. Sums run in float32 for 16-bit gradients, and the result is
    rounded once.

    A weight with a single input per unit (``K = 1``) has a zero projection: it would never train.
    The reference does the same; :func:`gcfunc.select` leaves such weights out.

    Args:
        tree: A pytree of gradients. Nothing in it is written.
        where: ``"gc"``, every tensor with at least 2 dimensions; ``"gcc"``, convolution weights,
            which the reference takes as at least 4; a predicate ``(name, tensor) -> bool``; or a
            pytree of bools with the structure of ``tree``, such as :func:`gcfunc.select` makes.
            Tensors with fewer than 2 dimensions are left out whatever it says.

    Returns:
        A tree of the same structure. Leaves that ``where`` leaves out are the very same tensors.

    Raises:
        TypeError: a leaf is not a real floating-point strided tensor, or ``where`` is of no
            known kind.
        ValueError: ``where`` selects nothing, or does not match the structure of ``tree``.

    Example:
        >>> import torch, gcfunc
        >>> grads = {"weight": torch.tensor([[1.0, 2.0, 6.0]]), "bias": torch.tensor([1.0])}
        >>> gcfunc.centralize(grads)
        {'weight': tensor([[-2., -1.,  3.]]), 'bias': tensor([1.])}
    """
    flat = _tree.flatten(tree, "tree")
    require_tensors(flat.names, flat.leaves, "tree")
    units = resolve(where, flat)
    return flat.rebuild(centralize_list(flat.leaves, units))


def centralize_list(gs: Sequence[Tensor], units: Sequence[Unit | None]) -> list[Tensor]:
    """:func:`project` for a list; ``None`` leaves a tensor out."""
    return [
        g if unit is None else centralize_one(g, unit) for g, unit in zip(gs, units, strict=True)
    ]


def centralize_one(g: Tensor, unit: Unit) -> Tensor:
    """:func:`project` for a tensor of any dtype, sharded or not."""
    if _sharding.is_dtensor(g):
        return _sharding.whole(centralize_one(_sharding.local(g), _of_part(unit, g)), like=g)
    wide = compute_dtype(g.dtype)
    return project(g, unit) if g.dtype is wide else project(g.to(wide), unit).to(g.dtype)


def of_parts(units: Sequence[Unit | None], tensors: Sequence[Tensor]) -> list[Unit | None]:
    """How the parts of the tensors that this process holds are centralized."""
    return [unit and _of_part(unit, t) for unit, t in zip(units, tensors, strict=True)]


def _of_part(unit: Unit, t: Tensor) -> Unit:
    if isinstance(unit, Units) and _sharding.is_dtensor(t):
        shards = Shards.of(t)
        if shards.cut([dim for dim in range(t.ndim) if dim != unit.dim]):
            return Sharded(unit, shards)
    return unit  # no unit is spread


def resolve(where: Where, flat: Flat, members: Sequence[int] | None = None) -> list[Unit | None]:
    """What ``where`` means for each leaf: how it is centralized, or ``None`` for not at all.

    ``members`` restricts the question to some of the leaves; a pytree of bools still has to match
    them all. Of a packed tree, ``where`` is asked about the original tensors.
    """
    members = range(len(flat.names)) if members is None else members
    if flat.layout is None:
        return [*_resolve(where, flat.names, flat.leaves, members)]
    originals = flat.layout.originals(flat.leaves)
    position = {name: i for i, name in enumerate(originals)}
    leaves = [flat.layout.leaves[i] for i in members]
    asked = [position[member.names[0]] for leaf in leaves for member in leaf.members]
    units = iter(_resolve(where, list(originals), list(originals.values()), asked))
    return [
        _joined(leaf, flat.leaves[i], [next(units) for _ in leaf.members])
        for i, leaf in zip(members, leaves, strict=True)
    ]


def answers(
    where: Where, names: Sequence[str], leaves: Sequence[Tensor], members: Sequence[int]
) -> list[Units | None]:
    """What ``where`` means for some of the leaves; it may select none of them."""
    if isinstance(where, str):
        require_rule(where)
        return [by_rule(where, leaves[i]) for i in members]
    if _tree.is_function(where):
        return [_units(names[i], leaves[i], where(names[i], leaves[i])) for i in members]
    mask = _tree.leaves_like(where, names, "where", "params")
    return [_units(names[i], leaves[i], mask[i]) for i in members]


def answers_for_some(where: Where, some: Mapping[str, Tensor]) -> dict[str, Units | None]:
    """What ``where`` means for some of the tensors that a mask, if it is one, is for."""
    names, tensors = [*some], [*some.values()]
    if not isinstance(where, str) and not _tree.is_function(where):
        mask = _tree.flatten(where, "where")
        given = dict(zip(mask.names, mask.leaves, strict=True))
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"where: the mask has no {', '.join(map(repr, missing))}")
        where = {name: given[name] for name in names}
    return dict(zip(names, answers(where, names, tensors, range(len(names))), strict=True))


def _resolve(
    where: Where, names: Sequence[str], leaves: Sequence[Tensor], members: Sequence[int]
) -> list[Units | None]:
    units = answers(where, names, leaves, members)
    if not any(units):
        shapes = [f"{names[i]} {tuple(leaves[i].shape)}" for i in members[:4]]
        raise ValueError(
            f"where={_show(where)} selects none of {len(members)} tensors "
            f"({', '.join(shapes)}{', ...' if len(members) > 4 else ''}); "
            "nothing would be centralized (gc=None says so)"
        )
    return units


def by_rule(where: str, tensor: Tensor) -> Units | None:
    """What one of the reference's rules says of a tensor."""
    return ROWS if tensor.ndim >= MIN_DIMS[where] else None


def _joined(leaf: Leaf, tensor: Tensor, units: Sequence[Units | None]) -> Unit | None:
    """The unit of a packed tensor from those of its members."""
    first, as_it_is = units[0], tensor.shape == leaf.members[0].shape
    if all(unit == first for unit in units) and (first in (None, ROWS) or as_it_is):
        return first
    parts: list[tuple[Member, Units | None]] = []
    for member, unit in zip(leaf.members, units, strict=True):
        if unit in (None, ROWS):
            # Rows are rows, whatever weights they come from.
            rows = member.size
            if parts and parts[-1][1] == unit:
                rows += parts.pop()[0].size
            member = Member((), (rows, *tensor.shape[1:]), tuple(range(tensor.ndim)), rows)
        parts.append((member, unit))
    return Stack(tuple(parts))


def require_rule(where: str) -> None:
    """Raise unless the string names one of the reference's rules."""
    if where not in MIN_DIMS:
        raise ValueError(f"where must be one of {', '.join(map(repr, MIN_DIMS))}, got {where!r}")


def _units(name: str, leaf: Tensor, answer: Any) -> Units | None:
    if isinstance(answer, bool):
        units = ROWS if answer else None
    elif isinstance(answer, Units):
        units = answer
    else:
        raise TypeError(f"where: {name!r} must map to a bool or Units, got {answer!r}")
    if units is None or leaf.ndim < 2:
        return None
    if not units.fit(leaf):
        raise ValueError(f"where: {units} does not fit {name!r} of shape {tuple(leaf.shape)}")
    return units if units.dim else ROWS  # a row is a row, whatever block it is in


def _show(where: Where) -> str:
    return repr(where) if isinstance(where, str) else f"<{type(where).__name__}>"
