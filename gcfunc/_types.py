"""What the library passes around: a GC choice, a state, a rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from gcfunc._foreach import Tensors
from gcfunc._hyperparams import Number, check, check_betas, to_scalars
from gcfunc._packed import Column
from gcfunc.centralize import MIN_DIMS, Unit, Where, require_rule

Scalars = Mapping[str, Tensor]
Slots = dict[str, Tensors]


@dataclass(frozen=True)
class GC:
    """Which weights are centralized, and where in the step.

    Args:
        where: As in :func:`gcfunc.centralize`: ``"gc"`` every weight, ``"gcc"`` convolution
            weights only, a predicate ``(name, tensor) -> bool``, or a pytree of bools matching
            params, such as :func:`gcfunc.select` makes.
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


def as_gc(gc: "GC | str | None") -> GC | None:
    """The ``gc=`` argument of a constructor as a :class:`GC`, or ``None`` for plain."""
    if gc is None or isinstance(gc, GC):
        return gc
    if isinstance(gc, str) and gc in MIN_DIMS:
        return GC(where=gc)
    error = ValueError if isinstance(gc, str) else TypeError
    raise error(
        "gc must be None, 'gc', 'gcc' or a gcfunc.GC, which takes a mask or a predicate as "
        f"GC(where=...); got {gc!r}"
    )


class State(NamedTuple):
    """An optimizer's state, a pytree of plain tensors.

    Attributes:
        step: How many steps were taken, a 0-d int64 tensor.
        hyperparams: 0-d float64 tensors by name (``lr``, ``weight_decay``, ``beta1``, ...; int64
            for lookahead's ``k``);
            :func:`gcfunc.update_hyperparams` changes them. In a state of
            :func:`gcfunc.partition` each name starts with its group's label and a dot.
        slots: The algorithm's running quantities under torch.optim's names, each a dict from the
            parameter's dotted name: ``state.slots["exp_avg"]["conv.weight"]``. Of packed params
            they are packed too.
    """

    step: Tensor
    hyperparams: dict[str, Tensor]
    slots: Mapping[str, Column]


def require_state(state: object) -> None:
    """Raise TypeError for what is no state."""
    if not isinstance(state, State):
        raise TypeError(f"state must come from init or step, got {type(state).__name__}")


@dataclass(frozen=True, eq=False)
class Rule:
    """One algorithm on lists of tensors that share a dtype and a device.

    Attributes:
        name: The constructor's name, for messages.
        hyperparams: Initial hyperparameters.
        slots: For each running quantity, what it starts as for a given parameter.
        scalars: ``(step, hyperparams) -> scalars``: all scalar arithmetic of a step, in float64.
        update: ``(params, grads, slots, scalars, units) -> (params, slots)``, out of place. The
            scalars arrive in the lists' dtype.
        gc: Which leaves ``units`` selects.
    """

    name: str
    hyperparams: Mapping[str, Number]
    slots: Mapping[str, Callable[[Tensor], Tensor]]
    scalars: Callable[[Tensor, Scalars], dict[str, Tensor]]
    update: Callable[
        [Tensors, Tensors, Slots, Scalars, Sequence[Unit | None]], tuple[Tensors, Slots]
    ]
    gc: GC | None


def update_hyperparams(state: State, **values: Any) -> State:
    """The same state with other hyperparameters; a compiled step does not recompile.

    ``step`` and ``slots`` are shared with the state given, so that of the two only one may be
    handed to a donated step.

    Args:
        state: A state; it is not changed.
        values: New values by the names in ``state.hyperparams``, numbers or 0-d tensors;
            ``betas=(0.9, 0.99)`` sets ``beta1`` and ``beta2``. In a state of
            :func:`gcfunc.partition`, ``lr=0.1`` sets every group's and ``**{"head.lr": 0.1}``
            that of one.

    Raises:
        ValueError: the state has no such hyperparameter, or the value is out of its bounds.
        TypeError: the value is neither a number nor a real 0-d tensor, or ``state`` is no state.

    Example:
        >>> import torch, gcfunc
        >>> state = gcfunc.sgd(lr=0.1).init({"w": torch.ones(2)})
        >>> float(gcfunc.update_hyperparams(state, lr=0.05).hyperparams["lr"])
        0.05
    """
    require_state(state)
    hyperparams = dict(state.hyperparams)
    for qualified, value in values.items():
        prefix, dot, name = qualified.rpartition(".")
        for part in ("beta1", "beta2") if name == "betas" else (name,):
            ending = prefix + dot + part
            alone = dot and ending in hyperparams
            keys = [ending] if alone else [k for k in hyperparams if f".{k}".endswith(f".{ending}")]
            if not keys:
                hint = "; momentum needs a buffer: build the optimizer with it, or with a tensor"
                raise ValueError(
                    f"the state has no hyperparameter {ending!r}, it has {', '.join(hyperparams)}"
                    + (hint if part in ("momentum", "dampening") else "")
                )
            new = check_betas(value) if name == "betas" else check(**{name: value})
            for key in keys:
                hyperparams[key] = to_scalars({part: new[part]}, hyperparams[key].device)[part]
    return state._replace(hyperparams=hyperparams)
