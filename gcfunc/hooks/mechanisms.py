"""How one parameter's gradients are centralized during backward: one class for each way.

A mechanism says four things, none of which has a default: where torch calls it
(:meth:`Mechanism.register`), what its hook does with the gradient (:meth:`Mechanism.hook`), whether
it runs before hooks of others (``runs_first``), and whether it can meet sparse gradients
(``meets_sparse``). What is the same for all is done around them: frozen and swapped parameters,
saving, and what the user said about sparse rows.

Only a hook that runs before accumulation serves ordinary parameters in every way: so do
``torch.autograd.grad`` and gradient penalties see centralized gradients, and a refused sparse one
leaves ``.grad`` as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from gcfunc._centralization.formula import ROWS, Units
from gcfunc._centralization.kinds import centralize_one, of_tensor
from gcfunc._tensors.sharding import is_dtensor

Sparse = Literal["error", "rows", "skip"]
"""What to do with sparse gradients: refuse them, centralize their rows, or leave them."""


@dataclass
class SeenByAutograd:
    """Whether autograd itself was seen to handle a parameter's gradient."""

    yes: bool = False


@dataclass(frozen=True, eq=False)
class Mechanism(ABC):
    """One way to centralize the gradients of one parameter."""

    name: str
    units: Units
    sparse: Sparse
    seen: SeenByAutograd = field(default_factory=SeenByAutograd)

    @property
    @abstractmethod
    def runs_first(self) -> bool:
        """Whether hooks of others on the parameter have to come later."""

    @property
    @abstractmethod
    def meets_sparse(self) -> bool:
        """Whether the gradients that it sees may be sparse."""

    @abstractmethod
    def register(self, param: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
        """Have torch call the hook."""

    @abstractmethod
    def hook(self) -> Callable[..., Any]:
        """The function for torch to call, which is to use :meth:`centralized`."""

    def install(self, param: Tensor) -> tuple[RemovableHandle, Callable[..., Any]]:
        """Put a hook on the parameter, and return the means to remove it, and the hook."""
        # torch.save then does not warn of DTensors' hooks. Of those of others it says nothing.
        hook: Callable[..., Any] = unserializable_hook(self.hook())  # type: ignore[no-untyped-call]
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(param, hooks) is not None:
                # After torch.utils.swap_tensors, autograd's C++ object knows nothing of the dict
                # of hooks that Python has for the parameter, and a hook added to that dict never
                # runs. Setting the dict again tells C++ about it.
                setattr(param, hooks, getattr(param, hooks))
        frozen = not param.requires_grad
        try:
            # A frozen parameter takes no new hooks, but keeps those that it has.
            param.requires_grad_(True)
            handle = self.register(param, hook)
            if self.runs_first:
                every: Any = handle.hooks_dict_ref()
                # Not OrderedDict.move_to_end: autograd reads the dict beneath, in C++, whose order
                # that does not change.
                for other in [key for key in every if key != handle.id]:
                    every[other] = every.pop(other)
        finally:
            param.requires_grad_(not frozen)
        return handle, hook

    def centralized(self, grad: Tensor) -> Tensor:
        """The gradient centralized, out of place."""
        if grad.layout is torch.strided:
            return centralize_one(grad, of_tensor(self.units, grad))
        if not self.meets_sparse:
            raise RuntimeError(f"the gradient of {self.name!r} is sparse, where none can be")
        return grad if self.sparse == "skip" else self._centralized_rows(grad)

    def _centralized_rows(self, grad: Tensor) -> Tensor:
        by_row = grad.layout is torch.sparse_coo and grad.sparse_dim() == 1
        if self.sparse == "error" or not by_row or self.units != ROWS:
            what = "sparse" if by_row else f"sparse ({grad.layout}), by other than rows,"
            raise RuntimeError(
                f"the gradient of {self.name!r} is {what} and cannot be centralized like this: "
                'call centralize_backward with sparse="rows" (exact for rows) or "skip", or leave '
                "it out by where"
            )
        # Several values may belong to one row. The projection of their sum is that of their
        # projections, so there is no need to add them up.
        values = centralize_one(grad._values(), self.units)
        return torch.sparse_coo_tensor(
            grad._indices(),
            values,
            grad.shape,
            is_coalesced=grad.is_coalesced(),
            check_invariants=False,  # said, as torch warns of it otherwise
        )


class BeforeAccumulation(Mechanism):
    """A tensor hook: autograd calls it before it adds a gradient to ``.grad``.

    Out of place, since the gradient may be a view of another's, of which autograd is then unaware:
    https://github.com/pytorch/pytorch/issues/34082.
    """

    runs_first = False
    meets_sparse = True

    def register(self, param: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
        """As :meth:`torch.Tensor.register_hook`."""
        handle: RemovableHandle = param.register_hook(hook)  # type: ignore[no-untyped-call]
        return handle

    def hook(self) -> Callable[[Tensor | None], Tensor | None]:
        """Gives the gradient that autograd goes on with."""

        def centralize(grad: Tensor | None) -> Tensor | None:
            self.seen.yes = True
            # None comes from functions that have no gradient for a parameter which they use.
            return None if grad is None else self.centralized(grad)

        return centralize


class AfterReduction(Mechanism):
    """A post-accumulate hook: FSDP2 calls it once it has reduced and set ``.grad``.

    Autograd never sees the gradients of parameters that FSDP2 manages, so a tensor hook would not
    run. Whether FSDP2 manages a DTensor is known only from the module that it was applied to, which
    need not be at hand; hence DTensors get both mechanisms, and this one does nothing once the
    other has run. In place, as the gradient is FSDP2's own buffer.
    """

    # An optimizer that steps during backward is such a hook too, and needs centralized gradients.
    runs_first = True
    # FSDP2 reduces dense gradients only.
    meets_sparse = False

    def register(self, param: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
        """As :meth:`torch.Tensor.register_post_accumulate_grad_hook`."""
        register: Any = param.register_post_accumulate_grad_hook  # not annotated
        handle: RemovableHandle = register(hook)
        return handle

    def hook(self) -> Callable[[Tensor], None]:
        """Writes ``.grad``."""

        @torch.no_grad()
        def centralize(param: Tensor) -> None:
            grad = param.grad
            if self.seen.yes or grad is None:
                return
            if is_dtensor(param) and param.device_mesh.device_type != grad.device.type:
                # FSDP2 copies offloaded gradients without waiting for the copy to end:
                # https://github.com/pytorch/pytorch/pull/180666.
                torch.accelerator.current_stream().synchronize()
            grad.copy_(self.centralized(grad))

        return centralize


def mechanisms_for(param: Tensor, name: str, units: Units, sparse: Sparse) -> list[Mechanism]:
    """What the parameter needs. The hook of the first is on it for as long as it is covered."""
    seen = SeenByAutograd()
    kinds = [BeforeAccumulation, AfterReduction] if is_dtensor(param) else [BeforeAccumulation]
    return [kind(name, units, sparse, seen) for kind in kinds]
