"""Gradients centralized in DDP's communication hook."""

# Not `from __future__ import annotations`: DDP compares the annotations of a communication hook
# with classes.

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gcfunc._centralization.formula import Units
from gcfunc._centralization.kinds import centralize_one
from gcfunc._centralization.where import Where, by_rule, require_name
from gcfunc.hooks.selection import HookRecord, refuse_sparse, select_parameters

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

CommHook = Callable[[Any, Any], "torch.futures.Future[Tensor]"]
"""A DDP communication hook, ``(state, bucket) -> future of the bucket's new content``."""


def register_ddp(
    ddp: "DistributedDataParallel",
    inner: CommHook | None = None,
    *,
    state: object = None,
    where: Where = "gc",
) -> tuple[str, ...]:
    """Centralize DDP's gradients after they are communicated.

    :func:`centralize_backward` serves DDP as well, and is as exact, except where the communication
    itself changes gradients: after compression they are no longer centralized. This centralizes
    what came out of it, in the gradient's own dtype.

    Args:
        ddp: The model. Its one communication hook must not be taken.
        inner: The hook that communicates: by default torch's ``allreduce_hook``, or
            ``fp16_compress_hook``, ``bf16_compress_hook``, ``powerSGD_hook``, ... One that also
            steps an optimizer would step before centralization.
        state: What ``inner`` gets as its state: by default the process group of ``ddp``, which is
            what torch's own take, those of PowerSGD excepted.
        where: As in :func:`centralize_backward`.

    Returns:
        The names of the parameters that are covered.

    Raises:
        TypeError: ``ddp`` is no DistributedDataParallel, or ``state`` is not what ``inner`` says
            that it takes.
        ValueError: as :func:`centralize_backward`; or communication does not go through the hook,
            which is so with ``delay_all_reduce_named_params``, with the Python reducer, and with
            sparse gradients.
        RuntimeError: ``ddp`` has a communication hook already.

    Example:
        >>> import torch
        >>> from gcfunc.hooks import register_ddp
        >>> from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
        >>> def main(model):  # in each process
        ...     ddp = torch.nn.parallel.DistributedDataParallel(model)
        ...     register_ddp(ddp, fp16_compress_hook)
    """
    if not (dist.is_available() and isinstance(ddp, DistributedDataParallel)):
        raise TypeError(f"ddp must be a DistributedDataParallel, got {type(ddp).__name__}")
    inner = inner or allreduce_hook
    state = ddp.process_group if state is None else state
    _require_state(inner, state)
    _require_comm_hook_runs(ddp)
    selected = select_parameters(ddp, where)
    hook = _comm_hook(inner, {s.param: s.units for s in selected}.get)
    ddp.register_comm_hook(state, hook)
    for s in selected:
        # The Python object is what the reducer's bucket gives.
        HookRecord(s.name, s.param, hook, in_python=True)
    return tuple(s.name for s in selected)


def ddp_comm_hook(inner: CommHook | None = None, where: str = "gc") -> CommHook:
    """A DDP communication hook that centralizes what ``inner`` communicated.

    :func:`register_ddp` is the easier way, and refuses what cannot work. This is for code that
    registers communication hooks itself::

        ddp.register_comm_hook(ddp.process_group, ddp_comm_hook(fp16_compress_hook))

    The state is handed on to ``inner``. Torch's hooks take a process group, and ``None`` for the
    default one, which is wrong where ``ddp`` has another.

    Args:
        inner: The hook that communicates, by default torch's ``allreduce_hook``.
        where: A rule; of names, and so of masks and predicates, a communication hook knows nothing.

    Raises:
        TypeError: ``where`` is no string.
        ValueError: ``where`` is an unknown string.
    """
    require_name(where)
    if not dist.is_available():
        raise RuntimeError("this torch was built without torch.distributed")
    return _comm_hook(inner or allreduce_hook, lambda param: by_rule(where, param))


def _require_state(inner: CommHook, state: object) -> None:
    arguments = [*inspect.signature(inner).parameters.values()]
    if len(arguments) < 2:
        raise TypeError(f"inner must be a hook that takes (state, bucket), got {inner!r}")
    wanted = arguments[0].annotation
    known = isinstance(wanted, type) and wanted is not inspect.Parameter.empty
    if known and not isinstance(state, wanted):
        raise TypeError(
            f"state must be a {wanted.__name__}, which the inner hook takes, got "
            f"{type(state).__name__}"
        )


def _require_comm_hook_runs(ddp: "DistributedDataParallel") -> None:
    """Raise where gradients would pass the communication hook by.

    Private attributes, as DDP has no public way to tell.
    """
    if ddp._comm_hooks:
        raise RuntimeError("ddp has a communication hook already; give it to register_ddp as inner")
    if ddp._delay_all_reduce_params:
        raise ValueError(
            "delay_all_reduce_named_params passes communication hooks by; use centralize_backward"
        )
    if ddp._use_python_reducer:
        raise ValueError(
            'torch._dynamo.config.optimize_ddp = "python_reducer" passes communication hooks by; '
            "use centralize_backward"
        )
    refuse_sparse(
        ddp,
        ddp.parameters(),
        'communication hooks are for dense ones; use centralize_backward with sparse="rows"',
    )


def _comm_hook(inner: CommHook, units_of: Callable[[Tensor], Units | None]) -> CommHook:
    # DDP wants a plain function, its arguments called so.
    def centralized(
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        params, dtype = bucket.parameters(), bucket.buffer().dtype

        def centralize(communicated: "torch.futures.Future[Any]") -> Tensor:
            value = communicated.value()
            content: Tensor = value if isinstance(value, Tensor) else value[0]
            content = content.to(dtype)
            for param, grad in zip(params, _gradients(content, params), strict=True):
                units = units_of(param)
                if units is not None:
                    grad.copy_(centralize_one(grad, units))
            return content

        return inner(state, bucket).then(centralize)

    return centralized


def _gradients(content: Tensor, params: Sequence[Tensor]) -> Iterator[Tensor]:
    """A bucket's content as gradients, laid out as DDP does: like the parameter if it is dense.

    ``GradBucket.gradients()`` gives the shapes and not the strides.
    """
    offset = 0
    for param in params:
        # Only strides without gaps and overlaps are kept by empty_like.
        stride = torch.empty_like(param, device="meta").stride()
        if stride != param.stride():
            stride = torch.empty(param.shape, device="meta").stride()
        yield content.as_strided(param.shape, stride, content.storage_offset() + offset)
        offset += param.numel()
