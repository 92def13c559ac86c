"""A functional optimizer's step in place: eager, compiled, or compiled with a way back."""

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gcfunc._compiled.eager import Answers, Step, step_eagerly
from gcfunc._compiled.graph import Graphs, compile_options, require_torch_compile
from gcfunc._compiled.planned import Planned
from gcfunc._rows.launch import LaunchError
from gcfunc._step.optimizer import Optimizer
from gcfunc._step.state import State
from gcfunc._tensors.trees import FlatTree


def eager(opt: Optimizer, units: Answers) -> Step:
    """The functional step in place, as it is."""
    return partial(step_eagerly, opt, units)


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
                LaunchError,
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
