"""A functional optimizer's step in place: eager, compiled, or compiled with a way back."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gcfunc._centralization.formula import Units
from gcfunc._compiled.graph import compile_options, require_torch_compile
from gcfunc._compiled.planned import Graphs, Planned
from gcfunc._step.optimizer import Optimizer, stepped
from gcfunc._step.state import State, slot_tensors
from gcfunc._tensors import sharding
from gcfunc._tensors.check import require_tensors
from gcfunc._tensors.trees import FlatTree

Step = Callable[[FlatTree, Sequence[Tensor], State], None]
"""A step in place, on trees that were taken apart."""
Answers = Sequence[Units | None]
"""What ``where`` says of each leaf."""


def eager(opt: Optimizer, units: Answers) -> Step:
    """The functional step, its results copied over what they were made from."""

    def step(flat: FlatTree, grads: Sequence[Tensor], state: State) -> None:
        require_tensors(flat.names, flat.leaves, "params")
        buckets = opt.buckets(flat, grads, state, units)
        new, new_state = stepped(flat, grads, state, buckets)
        old = [*flat.leaves, *slot_tensors(state)]
        torch._foreach_copy_(
            [sharding.local(t) for t in old],
            [sharding.local(t) for t in (*new, *slot_tensors(new_state))],
        )
        state.step.copy_(new_state.step)

    return step


def compiled(
    opt: Optimizer, units: Answers, graphs: Graphs, failures: list[Exception] | None
) -> Step:
    """A compiled step that shares ``graphs``.

    With a list for ``failures``, where compiling fails is noted there, and the step goes on eager.
    """
    if failures is None:
        require_torch_compile()
        return Planned(opt, compile_options({}), graphs, units).step
    otherwise = eager(opt, units)
    if not failures:
        try:
            require_torch_compile()
        except RuntimeError as error:
            _note(error, failures)
    planned = Planned(opt, compile_options({}), graphs, units)

    def step(flat: FlatTree, grads: Sequence[Tensor], state: State) -> None:
        if not failures:
            try:
                planned.step(flat, grads, state)
            # Inductor's own error comes where a cached graph lacks a compiler for its kernels.
            except (
                torch._dynamo.exc.TorchDynamoException,
                torch._inductor.exc.InvalidCxxCompiler,
            ) as error:
                _note(error, failures)
            else:
                return
        otherwise(flat, grads, state)

    return step


def _note(error: Exception, failures: list[Exception]) -> None:
    reason = " ".join(str(error).split("\n")[:2]).strip()
    warnings.warn(
        f"steps are not compiled, as torch.compile fails here ({reason}); compile=False says so",
        stacklevel=3,
    )
    failures.append(RuntimeError(reason))  # without what a traceback holds
