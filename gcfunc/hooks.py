"""Gradients centralized during backward, for whatever optimizer comes after.

Autograd runs these hooks while the rest of the backward pass, and the communication of DDP and
FSDP2, goes on. The functional steps and ``torch.optim`` see gradients that are centralized already.
"""

# Not `from __future__ import annotations`: DDP compares the annotations of a communication hook
# with classes.

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from gcfunc import _tree
from gcfunc._check import FLOATS, require_tensors
from gcfunc._sharding import is_dtensor
from gcfunc.centralize import (
    ROWS,
    Unit,
    Where,
    by_rule,
    centralize_one,
    require_rule,
    resolve,
)

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

Sparse = Literal["error", "rows", "skip"]
CommHook = Callable[[Any, Any], "torch.futures.Future[Tensor]"]
"""A DDP communication hook, ``(state, bucket) -> future of the bucket's new content``."""


def centralize_backward(
    model: nn.Module, where: Where = "gc", *, sparse: Sparse = "error"
) -> "CentralizeHandle":
    r"""Centralize gradients while ``backward()`` computes them.

    Every gradient :math:`G` that reaches a selected parameter's ``.grad`` arrives as
    :math:`\Phi(G)`, see :func:`gcfunc.centralize`; any optimizer may take it from there. As
    :math:`\Phi` is linear, it makes no difference that gradients are accumulated, or averaged by
    DDP, after it.

    With an optimizer whose weight decay is coupled (L2: torch's SGD, Adam, Adagrad, RAdam) this is
    not the same as ``gc="gc"`` in a functional step, which centralizes the decay too.

    Whatever reads ``.grad`` afterwards sees centralized gradients. ``clip_grad_norm_`` then clips
    these, where before a functional step it clips first, as the paper's author does. GradScaler
    needs nothing special: what overflowed stays so.

    Each parameter gets the kind of hook that is right for it: a tensor hook, out of place, or
    where FSDP2 manages it a post-accumulate hook that runs after the reduction. Sharded gradients
    stay sharded; processes communicate only where a dimension that a mean runs over is sharded, as
    in row-wise tensor parallel. DDP over tensor parallel is refused.

    A weight with one input per unit, as the magnitude of ``weight_norm``, has a centralized
    gradient of zero under ``"gc"``; ``where=gcfunc.select(model)`` leaves it out.

    Register after whatever replaces parameters: ``fully_shard``, ``parallelize_module``,
    ``to_empty``, ``load_state_dict(assign=True)``, ``model.to(dtype)`` of DTensors, ``deepcopy``,
    parametrizations such as ``weight_norm``, new submodules.
    Hooks stay with the old ones silently; :meth:`CentralizeHandle.check` tells.
    ``torch.func`` and ``functional_call`` with other tensors know no hooks: use the functional
    steps there.

    Args:
        model: The model, plain, compiled, wrapped in DDP, sharded by FSDP2 or tensor parallel.
            Frozen parameters are covered for the time that they are unfrozen.
        where: As in :func:`gcfunc.centralize`, :func:`gcfunc.select` masks included; of the names
            in ``model.named_parameters()``.
        sparse: What to do with sparse gradients of selected parameters, as those of
            ``nn.Embedding(sparse=True)``: ``"error"`` refuses them, ``"rows"`` centralizes the
            rows they have, which is exact, and ``"skip"`` leaves them.

    Returns:
        A handle that removes the hooks, by itself at the end of a ``with`` block.

    Raises:
        TypeError: ``model`` is no module, is sharded by FSDP1 or by DDP over tensor parallel, or a
            selected parameter is of an unsupported kind (complex, on meta, ...).
        ValueError: ``where`` selects nothing, a parameter is centralized by another hook already,
            gradients will be sparse, or the model is only partly sharded by FSDP2.
        RuntimeError: ``torch._dynamo.config.trace_autograd_ops`` is set, with which compiled code
            drops hooks.

    Example:
        >>> import torch
        >>> from gcfunc.hooks import centralize_backward
        >>> model = torch.nn.Linear(3, 1)
        >>> handle = centralize_backward(model)
        >>> handle.names
        ('weight',)
        >>> model(torch.tensor([[1.0, 2.0, 6.0]])).sum().backward()
        >>> model.weight.grad
        tensor([[-2., -1.,  3.]])
        >>> handle.remove()
    """
    if sparse not in get_args(Sparse):
        raise ValueError(f"sparse must be one of {get_args(Sparse)}, got {sparse!r}")
    _require_that_hooks_run()
    selected = _select(model, where)
    managed = _managed_by_fsdp2(model, selected)
    if sparse == "error":
        _refuse_sparse(model, [param for _, param, _ in selected], 'sparse="rows" or "skip"')
    return CentralizeHandle(selected, managed, sparse)


class CentralizeHandle:
    """The hooks of one :func:`centralize_backward`.

    They stay when the handle is dropped, until the parameters themselves go.
    """

    def __init__(self, selected: "Selected", managed: set[Tensor], sparse: Sparse) -> None:
        self._covered: list[_Covered] = []
        self._hooks: list[RemovableHandle] = []
        try:
            for name, param, unit in selected:
                hook = _register(name, param, unit, sparse, self._hooks)
                self._covered.append(_Covered(name, param, hook, in_python=param in managed))
        except BaseException:
            self.remove()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are covered, by their names when the hooks were registered."""
        return tuple(covered.name for covered in self._covered)

    def remove(self) -> None:
        """Remove the hooks; a second time does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        _active.difference_update(self._covered)

    def check(self, model: nn.Module) -> None:
        """Raise unless every hook is still on a parameter of ``model``.

        Cheap enough for every step. ``model`` may be wrapped otherwise than when the hooks were
        registered. Of a model sharded by FSDP2 it gathers nothing, but frees what is gathered.

        Raises:
            RuntimeError: the hooks were removed, or parameters were replaced; which, and by what
                that usually happens.
        """
        if not self._hooks:
            raise RuntimeError("the hooks were removed")
        _require_that_hooks_run()
        _reshard(model)
        present = {id(param): param for param in model.parameters()}
        lost = [c.name for c in self._covered if not c.is_on(present.get(c.param))]
        if lost:
            raise RuntimeError(
                f"{', '.join(map(repr, lost))}: replaced since the hooks were registered, so that "
                "gradients are not centralized (deepcopy, to_empty, load_state_dict(assign=True), "
                "fully_shard, parallelize_module, and of DTensors to(dtype), replace parameters); "
                "remove() the handle and call centralize_backward again"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self._hooks else ", removed"
        return f"CentralizeHandle({', '.join(self.names)}{state})"


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
    selected = _select(ddp, where)
    hook = _comm_hook(inner, {param: unit for _, param, unit in selected}.get)
    ddp.register_comm_hook(state, hook)
    for name, param, _ in selected:
        # The Python object is what the reducer's bucket gives.
        _Covered(name, param, hook, in_python=True)
    return tuple(name for name, _, _ in selected)


def ddp_comm_hook(inner: CommHook | None = None, where: Literal["gc", "gcc"] = "gc") -> CommHook:
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
    if not isinstance(where, str):
        raise TypeError(
            "where must be 'gc' or 'gcc'; masks and predicates need names, which "
            f"gcfunc.hooks.register_ddp knows; got {where!r}"
        )
    require_rule(where)
    if not dist.is_available():
        raise RuntimeError("this torch was built without torch.distributed")
    return _comm_hook(inner or allreduce_hook, lambda param: by_rule(where, param))


class _Covered:
    """A parameter that is centralized by a hook, for as long as the hook lives.

    Known by its id: torch does not convert by swapping tensors, as ``model.to(dtype)`` does with
    DTensors, what somebody has a weak reference to. The hook lives as long as the parameter, or
    as the DDP that it was registered with.

    ``in_python`` says whether the hook is known to the Python object. If not, it is to the C++
    object beneath, at ``_cdata``, which swapping tensors replaces. Private, with no public way to
    tell.
    """

    def __init__(
        self, name: str, param: Tensor, hook: Callable[..., Any], *, in_python: bool
    ) -> None:
        self.name = name
        self.param = id(param)
        self._address = None if in_python else param._cdata
        _active.add(self)
        weakref.finalize(hook, _active.discard, self).atexit = False

    def is_on(self, param: Tensor | None) -> bool:
        """Whether the hook still is where the gradients of ``param``, of that id, arrive."""
        return param is not None and self in _active and self._address in (None, param._cdata)


Selected = list[tuple[str, Tensor, Unit]]

_active: set[_Covered] = set()


def _select(model: nn.Module, where: Where) -> Selected:
    """The parameters to centralize, or the error that says why they cannot be."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dist.is_available() and any(
        isinstance(m, FullyShardedDataParallel) for m in model.modules()
    ):
        raise TypeError(
            "FullyShardedDataParallel (FSDP1) flattens weights, so that they have no rows to "
            "centralize; shard with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    _reshard(model)
    named = dict(model.named_parameters())
    # Private, as nothing public tells what DDP made of a DTensor.
    if cut := [name for name, p in named.items() if hasattr(p, "_st_info")]:
        raise TypeError(
            f"{', '.join(map(repr, cut))}: DDP over tensor parallel keeps each process's part of a "
            "weight and nothing of its rows; use FSDP2 (fully_shard) over tensor parallel"
        )
    for name, p in named.items():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"model: {name!r} has no shape yet; run the model once")
    # Quantized weights, say, are frozen for good.
    trainable = [
        i
        for i, p in enumerate(named.values())
        if p.requires_grad or (p.dtype in FLOATS and not p.is_inference())
    ]
    flat = _tree.flatten(named, "model")
    units = resolve(where, flat, trainable)
    chosen = {flat.names[i]: unit for i, unit in zip(trainable, units, strict=True) if unit}
    require_tensors([*chosen], [named[name] for name in chosen], "model")
    present = {id(param): param for param in named.values()}
    # Copied, as garbage collection may take from it at any time.
    taken = {c.param for c in [*_active] if c.is_on(present.get(c.param))}
    if twice := [name for name in chosen if id(named[name]) in taken]:
        raise ValueError(
            f"{', '.join(map(repr, twice))}: already centralized by hooks registered before; "
            "remove() their handle first, or drop the DDP that register_ddp was called with"
        )
    return [(name, named[name], unit) for name, unit in chosen.items()]


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 put its sharded parameters, which bear the hooks, back into the model."""
    if dist.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _managed_by_fsdp2(model: nn.Module, selected: Selected) -> set[Tensor]:
    if not dist.is_available():
        return set()
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    within = {p for module in modules for p in module.parameters()}
    outside = [name for name, param, _ in selected if param.requires_grad and param not in within]
    if modules and outside:
        raise ValueError(
            f"{', '.join(map(repr, outside))}: not in a module that fully_shard was applied to, "
            "while others are. Register after the last fully_shard, which would leave the hooks "
            "behind; or, if they are to stay as they are, leave them out by where and give "
            "centralize_backward their own module"
        )
    return {p for p in within if is_dtensor(p)}


def _refuse_sparse(model: nn.Module, params: Iterable[Tensor | None], way_out: str) -> None:
    of_interest = {*params}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and module.sparse
            and module.weight.requires_grad
            and module.weight in of_interest
        ):
            raise ValueError(
                f"{name or type(module).__name__!r} has sparse=True, and its weight's gradient "
                f"will be sparse; {way_out}"
            )


def _register(
    name: str, param: Tensor, unit: Unit, sparse: Sparse, handles: list[RemovableHandle]
) -> Callable[..., Any]:
    """Register what the parameter needs, add to ``handles``, and give the hook that counts."""
    ordinary = _Ordinary()
    before = _before_accumulation(name, unit, sparse, ordinary)
    if param._backward_hooks is not None:
        # After swapping tensors the C++ object knows nothing of the Python object's hooks, nor
        # of those to come.
        param._backward_hooks = param._backward_hooks
    frozen = not param.requires_grad
    try:
        # What is frozen takes no hooks, but keeps those that it has.
        param.requires_grad_(True)
        handles.append(_hook(param.register_hook, before))
        if is_dtensor(param):
            # If FSDP2 manages it, which the module at hand need not tell, autograd never sees it.
            after = _after_reduction(unit, ordinary)
            handles.append(_hook(param.register_post_accumulate_grad_hook, after))
            # Private: before hooks of others, such as an optimizer that steps during backward.
            hooks: Any = param._post_accumulate_grad_hooks
            hooks.move_to_end(handles[-1].id, last=False)
    finally:
        param.requires_grad_(not frozen)
    return before


def _hook(register: Any, hook: Callable[[Tensor], Any]) -> RemovableHandle:
    # torch.save then does not warn of DTensors' hooks. Of those of others it says nothing anyway.
    handle: RemovableHandle = register(unserializable_hook(hook))  # type: ignore[no-untyped-call]
    return handle


@dataclass
class _Ordinary:
    """Whether autograd itself was seen to handle a parameter's gradient."""

    seen: bool = False


def _before_accumulation(
    name: str, unit: Unit, sparse: Sparse, ordinary: _Ordinary
) -> Callable[[Tensor | None], Tensor | None]:
    """Out of place: the gradient may be a view of another's, of which autograd then is unaware.

    See https://github.com/pytorch/pytorch/issues/34082.
    """

    def centralize(grad: Tensor | None) -> Tensor | None:
        ordinary.seen = True
        if grad is None:  # from functions that give none for a parameter which they use
            return None
        if grad.layout is torch.strided:
            return centralize_one(grad, unit)
        return grad if sparse == "skip" else _centralize_sparse(name, grad, unit, sparse)

    return centralize


def _centralize_sparse(name: str, grad: Tensor, unit: Unit, sparse: Sparse) -> Tensor:
    by_row = grad.layout is torch.sparse_coo and grad.sparse_dim() == 1
    if sparse == "error" or not by_row or unit != ROWS:
        what = "sparse" if by_row else f"sparse ({grad.layout}), by other than rows,"
        raise RuntimeError(
            f"the gradient of {name!r} is {what} and cannot be centralized like this: call "
            'centralize_backward with sparse="rows" (exact for rows) or "skip", or leave it out '
            "by where"
        )
    # Several values may belong to one row. The projection of their sum is that of their
    # projections, so there is no need to add them up.
    values = centralize_one(grad._values(), unit)
    return torch.sparse_coo_tensor(
        grad._indices(),
        values,
        grad.shape,
        is_coalesced=grad.is_coalesced(),
        check_invariants=False,  # said, as torch warns of it otherwise
    )


def _after_reduction(unit: Unit, ordinary: _Ordinary) -> Callable[[Tensor], None]:
    """In place: the gradient is FSDP2's own buffer, which others would keep alive for nothing."""

    @torch.no_grad()
    def centralize(param: Tensor) -> None:
        grad = param.grad
        if ordinary.seen or grad is None:
            return
        if is_dtensor(param) and param.device_mesh.device_type != grad.device.type:
            # Offloaded, it may not have arrived: https://github.com/pytorch/pytorch/pull/180666.
            torch.accelerator.current_stream().synchronize()
        grad.copy_(centralize_one(grad, unit))

    return centralize


def _require_that_hooks_run() -> None:
    if getattr(torch._dynamo.config, "trace_autograd_ops", False):
        raise RuntimeError(
            "with torch._dynamo.config.trace_autograd_ops compiled code drops gradient hooks; "
            "switch it off, or use the functional steps"
        )


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
    _refuse_sparse(
        ddp,
        ddp.parameters(),
        'communication hooks are for dense ones; use centralize_backward with sparse="rows"',
    )


def _comm_hook(inner: CommHook, unit_of: Callable[[Tensor], Unit | None]) -> CommHook:
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
                unit = unit_of(param)
                if unit is not None:
                    grad.copy_(centralize_one(grad, unit))
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
