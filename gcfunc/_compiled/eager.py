"""A functional optimizer's step in place without compilation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gcfunc._centralization.formula import Units
from gcfunc._step.optimizer import Optimizer, stepped
from gcfunc._step.state import State, slot_tensors
from gcfunc._tensors import sharding
from gcfunc._tensors.check import require_tensors
from gcfunc._tensors.trees import FlatTree

Step = Callable[[FlatTree, Sequence[Tensor], State], None]
"""A step in place, on trees that were taken apart."""
Answers = Sequence[Units | None]
"""What ``where`` says of each leaf."""


def step_eagerly(
    opt: Optimizer,
    units: Answers | None,
    flat: FlatTree,
    grads: Sequence[Tensor | None],
    state: State,
) -> None:
    """The functional step, its results copied over what they were made from."""
    require_tensors(flat.names, flat.leaves, "params")
    buckets = opt.buckets(flat, grads, state, units)
    new, new_state = stepped(flat, grads, state, buckets)
    old = [*flat.leaves, *slot_tensors(state)]
    torch._foreach_copy_(
        [sharding.local(t) for t in old],
        [sharding.local(t) for t in (*new, *slot_tensors(new_state))],
    )
    state.step.copy_(new_state.step)
