"""What an optimizer remembers from step to step."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from gcfunc._tensors.packed import SlotValues


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
    slots: Mapping[str, SlotValues]


def require_state(state: object) -> None:
    """Raise TypeError for what is no state."""
    if not isinstance(state, State):
        raise TypeError(f"state must come from init or step, got {type(state).__name__}")


def require_scalars(state: State) -> None:
    """Raise TypeError unless step and hyperparameters are 0-d tensors."""
    for name, scalar in (("step", state.step), *state.hyperparams.items()):
        if not isinstance(scalar, Tensor) or scalar.ndim:
            raise TypeError(
                f"state: {name!r} must be a 0-d tensor, got {scalar!r}; "
                "gcfunc.update_hyperparams makes one of a number"
            )


def slot_tensors(state: State) -> list[Tensor]:
    """All tensors of all slots."""
    return [tensor for values in state.slots.values() for tensor in values.values()]


def tensors(state: State) -> list[Tensor]:
    """All that a state holds."""
    return [state.step, *state.hyperparams.values(), *slot_tensors(state)]
