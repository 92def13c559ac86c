"""Which weights are centralized: the rules, and what else a user may say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from gcfunc._centralization.formula import ROWS, Projection, Units
from gcfunc._centralization.kinds import of_packed, of_tensor
from gcfunc._tensors import trees
from gcfunc._tensors.trees import FlatTree, Tree

LayerKind = Literal["linear", "convolution"]


class Rule(NamedTuple):
    """A choice of weights that has a name.

    Attributes:
        meaning: In words.
        selects: Whether it takes a tensor of so many dimensions.
        layers: Which modules' weights :func:`gcfunc.select` takes for it.
        packed_apart: Whether :func:`gcfunc.pack` lets no matrix hold both what it selects and what
            it does not. If not, such a matrix is cut up where the rule is used.
    """

    meaning: str
    selects: Callable[[int], bool]
    layers: frozenset[LayerKind]
    packed_apart: bool = False


RULES = {
    "gc": Rule("every weight", lambda ndim: ndim >= 2, frozenset({"linear", "convolution"})),
    "gcc": Rule(
        "convolution weights, told by at least 4 dimensions",
        lambda ndim: ndim >= 4,
        frozenset({"convolution"}),
        packed_apart=True,
    ),
    "linear": Rule(
        "weights of exactly 2 dimensions", lambda ndim: ndim == 2, frozenset({"linear"})
    ),
}
"""``"gc"`` and ``"gcc"`` are the reference's. All go by the number of dimensions."""

Predicate = Callable[[str, Tensor], "bool | Units"]
Where = str | Predicate | Tree
"""The name of a rule, a predicate, or a pytree of bools (or :class:`Units`) matching params."""


@dataclass(frozen=True)
class GC:
    """Which weights are centralized, and where in the step.

    Args:
        where: As in :func:`gcfunc.centralize`: the name of a rule, a predicate
            ``(name, tensor) -> bool``, or a pytree of bools matching params, such as
            :func:`gcfunc.select` makes.
        at: ``"gradient"`` centralizes the gradient (and a coupled weight decay with it) before the
            algorithm sees it; ``"update"`` centralizes what the algorithm made of it, just before
            it is multiplied by lr, decoupled weight decay included. The reference's ``_GC2``
            classes and its ``gc_loc=False`` are ``"update"``.

    Raises:
        ValueError: ``where`` or ``at`` is an unknown string.

    Example:
        >>> import gcfunc
        >>> gcfunc.GC(where="gcc", at="update")
        GC(where='gcc', at='update')
    """

    where: Where = "gc"
    at: Literal["gradient", "update"] = "gradient"

    def __post_init__(self) -> None:
        if isinstance(self.where, str):
            require_rule(self.where)
        if self.at not in ("gradient", "update"):
            raise ValueError(f"at must be 'gradient' or 'update', got {self.at!r}")


def as_gc(gc: GC | str | None) -> GC | None:
    """The ``gc=`` argument of a constructor as a :class:`GC`, or ``None`` for plain."""
    if gc is None or isinstance(gc, GC):
        return gc
    if isinstance(gc, str) and gc in RULES:
        return GC(where=gc)
    error = ValueError if isinstance(gc, str) else TypeError
    raise error(
        f"gc must be None, {_names(', ')} or a gcfunc.GC, which takes a mask or a predicate as "
        f"GC(where=...); got {gc!r}"
    )


def require_rule(where: str) -> None:
    """Raise ValueError unless the string names a rule."""
    if where not in RULES:
        raise ValueError(f"where must be one of {_names(', ')}, got {where!r}")


def require_name(where: object) -> None:
    """Raise unless this is a rule's name, for callers that know nothing but tensors."""
    if not isinstance(where, str):
        raise TypeError(
            f"where must be {_names(' or ')}; masks and predicates need names, which "
            f"gcfunc.hooks.register_ddp knows; got {where!r}"
        )
    require_rule(where)


def _names(between: str) -> str:
    return between.join(map(repr, RULES))


def by_rule(where: str, tensor: Tensor) -> Units | None:
    """What a rule says of a tensor."""
    return ROWS if RULES[where].selects(tensor.ndim) else None


def rules_apart(tensor: Tensor) -> tuple[bool, ...]:
    """What those rules say of it that :func:`gcfunc.pack` makes matrices for."""
    return tuple(rule.selects(tensor.ndim) for rule in RULES.values() if rule.packed_apart)


def answers(
    where: Where, names: Sequence[str], leaves: Sequence[Tensor], asked: Sequence[int]
) -> list[Units | None]:
    """What ``where`` means for those leaves that are asked for; it may select none of them."""
    if isinstance(where, str):
        require_rule(where)
        return [by_rule(where, leaves[i]) for i in asked]
    if trees.is_function(where):
        return [_units(names[i], leaves[i], where(names[i], leaves[i])) for i in asked]
    mask = trees.leaves_like(where, names, "where", "params")
    return [_units(names[i], leaves[i], mask[i]) for i in asked]


def answers_for_some(where: Where, some: Mapping[str, Tensor]) -> dict[str, Units | None]:
    """What ``where`` means for some of the tensors that a mask, if it is one, is for."""
    names, tensors = [*some], [*some.values()]
    if not isinstance(where, str) and not trees.is_function(where):
        mask = trees.flatten(where, "where")
        given = dict(zip(mask.names, mask.leaves, strict=True))
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"where: the mask has no {', '.join(map(repr, missing))}")
        where = {name: given[name] for name in names}
    return dict(zip(names, answers(where, names, tensors, range(len(names))), strict=True))


def resolve(
    where: Where, flat: FlatTree, asked: Sequence[int] | None = None
) -> list[Projection | None]:
    """What ``where`` means for each leaf: how it is centralized, or ``None`` for not at all.

    ``asked`` restricts the question to some of the leaves; a pytree of bools still has to match
    them all. Of a packed tree, ``where`` is asked about the original tensors. Whether it may select
    nothing is for the caller to say, by :func:`require_some`.
    """
    asked = range(len(flat.names)) if asked is None else asked
    if flat.layout is None:
        units = answers(where, flat.names, flat.leaves, asked)
        return [u and of_tensor(u, flat.leaves[i]) for i, u in zip(asked, units, strict=True)]
    originals = flat.layout.originals(flat.leaves)
    position = {name: i for i, name in enumerate(originals)}
    packed = [flat.layout.tensors[i] for i in asked]
    pieces = [position[piece.names[0]] for tensor in packed for piece in tensor.pieces]
    found = iter(answers(where, list(originals), list(originals.values()), pieces))
    return [
        of_packed(tensor, flat.leaves[i], [next(found) for _ in tensor.pieces])
        for i, tensor in zip(asked, packed, strict=True)
    ]


def require_some(
    where: Where, projections: Sequence[object], flat: FlatTree, asked: Sequence[int] | None = None
) -> None:
    """Raise ValueError if ``where`` was found to select none of the leaves that it was asked of."""
    if any(projections):
        return
    asked = range(len(flat.names)) if asked is None else asked
    leaves = {flat.names[i]: flat.leaves[i] for i in asked}
    if flat.layout is not None:
        leaves = flat.layout.only([*leaves]).originals([*leaves.values()])
    raise ValueError(
        f"where={show_where(where)} selects none of {len(leaves)} tensors "
        f"({show_shapes(leaves.items())}); nothing would be centralized (gc=None says so)"
    )


def show_where(where: Where) -> str:
    """A rule by its name, anything else by its type: a mask is long."""
    return repr(where) if isinstance(where, str) else f"<{type(where).__name__}>"


def show_shapes(named: Iterable[tuple[str, Tensor]]) -> str:
    """Names and shapes of the first few tensors."""
    shown = [f"{name} {tuple(t.shape)}" for name, t in itertools.islice(named, 5)]
    return ", ".join([*shown[:4], *(["..."] if len(shown) > 4 else [])])


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
