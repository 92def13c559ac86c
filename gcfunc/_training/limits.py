"""Models that a training step cannot take: which of their modules it is, and the way out.

A failure is looked at only once it has happened, so that a limit that torch lifts is lifted here.
"""

from __future__ import annotations

from collections.abc import Callable
from traceback import FrameSummary
from types import FrameType
from typing import Any

import torch
from torch import nn

from gcfunc._tensors.lists import transformed


def require_possible(model: nn.Module) -> None:
    """Raise ValueError for what is known before the first step."""
    for name, module in model.named_modules():
        sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if sparse and module.weight.requires_grad:
            raise ValueError(
                f"model: module {name!r} ({type(module).__name__}) makes sparse gradients, and "
                "only dense ones are stepped; make it with sparse=False"
            )


def require_uncompiled(objective: nn.Module) -> None:
    """Raise ValueError where :func:`torch.compile` would meet its own module in a trace."""
    for name, module in objective.named_modules():
        # Dynamo gives the parameters in it other names than it has.
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise ValueError(
                f"{_called(name, module)} is compiled already; make the training step of the "
                "module that was compiled"
            )


def explain(objective: nn.Module, error: Exception) -> None:
    """Raise ValueError if a forward under torch.func failed of one of torch.func's limits.

    By the frames from the innermost module's to where the error was raised.
    """
    modules = {id(module): (name, module) for name, module in objective.named_modules()}
    inside = id(objective)
    between: list[FrameType] = []
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in modules:
            inside, between = id(owner), []
        between.append(trace.tb_frame)
        trace = trace.tb_next
    for is_it, why in LIMITS.items():
        if is_it(between, error):
            raise ValueError(f"{_called(*modules[inside])} {why}") from error


def enable_saved_tensor_hooks() -> None:
    """Undo what a trace leaves that failed inside of torch.func.grad, as one of checkpoints does.

    Else whatever hooks saved tensors, checkpoints too, would be refused from then on, also outside
    of torch.func. By private names: the public ones only disable hooks, for a while.
    """
    autograd = torch._C._autograd
    said = autograd._saved_tensors_hooks_get_disabled_error_message()
    if (said or "").startswith("torch.func") and not transformed():
        autograd._saved_tensors_hooks_enable()


def explain_compiled(objective: nn.Module, error: Exception) -> None:
    """Raise ValueError if torch.compile failed of a kind of module, or of a module's code."""
    if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return
    found = [
        f"{_called(name, module)} {why}"
        for name, module in objective.named_modules()
        for is_it, why in UNTRACEABLE.items()
        if is_it(module)
    ]
    if not found:
        found = _traced_last(objective, error)
    if found:
        said = f"torch.compile cannot trace {'; '.join(found)}; or step uncompiled"
        raise ValueError(said) from error


def _traced_last(objective: nn.Module, error: Exception) -> list[str]:
    """In words, the innermost module whose code was being traced: by its code, the first such."""
    reason = str(error).partition("\n")[0]
    # A private attribute: the message has this stack as text only.
    for frame in reversed(getattr(error, "real_stack", None) or []):
        for name, module in objective.named_modules():
            if module is not objective and _has_line(type(module), frame):
                where = f"line {frame.lineno} of {frame.filename}"
                return [f"{_called(name, module)}, {where} ({reason}); write it otherwise"]
    return []


def _has_line(kind: type[nn.Module], frame: FrameSummary) -> bool:
    code = getattr(getattr(kind, frame.name, None), "__code__", None)
    if code is None or code.co_filename != frame.filename:
        return False
    return frame.lineno in {line for _, _, line in code.co_lines()}


def _runs_checkpoints(between: list[FrameType], error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(
        _module(frame) == "torch.utils.checkpoint" for frame in between
    )


def _has_saved_tensor_hooks(between: list[FrameType], error: Exception) -> bool:
    return isinstance(error, RuntimeError) and _module(between[-1]) == "torch.autograd.graph"


# By torch's words, for want of classes or frames of their own.
def _has_old_function(between: list[FrameType], error: Exception) -> bool:
    return "must override the setup_context" in str(error)


def _writes_what_it_captured(between: list[FrameType], error: Exception) -> bool:
    return "would mutate a captured Tensor" in str(error)


def _module(frame: FrameType) -> Any:
    return frame.f_globals.get("__name__")


HOOKS = "torch.func refuses; leave it out, or train with loss.backward() and gcfunc.hooks"
LIMITS: dict[Callable[[list[FrameType], Exception], bool], str] = {
    _runs_checkpoints: f"runs torch.utils.checkpoint, which {HOOKS}",
    _has_saved_tensor_hooks: f"hooks saved tensors, which {HOOKS}",
    _has_old_function: (
        "runs a torch.autograd.Function without setup_context, which torch.func needs; write what "
        "forward does to its context there"
    ),
    _writes_what_it_captured: (
        "writes a tensor in place that is neither parameter nor buffer; register it as a buffer "
        "(register_buffer), which a training step carries on"
    ),
}
"""What torch.func cannot take."""


def _averages_over_all(module: nn.Module) -> bool:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    averages = isinstance(module, kinds) and module.momentum is None
    return averages and module.training and bool(module.track_running_stats)


def _is_recurrent(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase)


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


UNTRACEABLE: dict[Callable[[nn.Module], bool], str] = {
    _averages_over_all: (
        "with momentum=None, which reads its count of batches as a Python number; give it a "
        "momentum"
    ),
    _is_recurrent: "as a whole; call nn.LSTMCell, GRUCell or RNNCell for each step in time",
    _is_script: "for its being TorchScript; use the module that was scripted",
}
"""Modules that torch.compile cannot take here."""


def _called(name: str, module: nn.Module) -> str:
    part, _, own = name.partition(".")
    whole = "the model" if part == "model" else "loss_fn"
    kind = type(module).__name__
    return f"module {own!r} ({kind}) of {whole}" if own else f"{whole} ({kind})" if part else whole
