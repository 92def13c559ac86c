"""Gradients centralized by hooks on parameters, and the handle of these hooks."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gcfunc._centralization.where import Where
from gcfunc.hooks.mechanisms import Sparse, mechanisms_for
from gcfunc.hooks.selection import (
    HookRecord,
    Selected,
    active,
    managed_by_fsdp2,
    refuse_sparse,
    reshard,
    select_parameters,
)


def centralize_backward(
    model: nn.Module, where: Where = "gc", *, sparse: Sparse = "error"
) -> CentralizeHandle:
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
    selected = select_parameters(model, where)
    managed = managed_by_fsdp2(model, selected)
    if sparse == "error":
        refuse_sparse(model, [s.param for s in selected], 'sparse="rows" or "skip"')
    return CentralizeHandle(selected, managed, sparse)


class CentralizeHandle:
    """The hooks of one :func:`centralize_backward`.

    They stay when the handle is dropped, until the parameters themselves go.
    """

    def __init__(self, selected: Iterable[Selected], managed: set[Tensor], sparse: Sparse) -> None:
        self._records: list[HookRecord] = []
        self._hooks: list[RemovableHandle] = []
        try:
            for name, param, units in selected:
                hooks = []
                for mechanism in mechanisms_for(param, name, units, sparse):
                    handle, hook = mechanism.install(param)
                    self._hooks.append(handle)
                    hooks.append(hook)
                in_python = param in managed
                self._records.append(HookRecord(name, param, hooks[0], in_python=in_python))
        except BaseException:
            self.remove()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are covered, by their names when the hooks were registered."""
        return tuple(record.name for record in self._records)

    def remove(self) -> None:
        """Remove the hooks; a second time does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        active.difference_update(self._records)

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
        reshard(model)
        present = {id(param): param for param in model.parameters()}
        lost = [r.name for r in self._records if not r.is_on(present.get(r.param))]
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


def _require_that_hooks_run() -> None:
    if getattr(torch._dynamo.config, "trace_autograd_ops", False):
        raise RuntimeError(
            "with torch._dynamo.config.trace_autograd_ops compiled code drops gradient hooks; "
            "switch it off, or use the functional steps"
        )
