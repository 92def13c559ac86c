"""Model and loss as one module, and what neither may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gcfunc._tensors import trees
from gcfunc._tensors.modules import require_module, require_shape
from gcfunc._tensors.sharding import is_dtensor
from gcfunc._tensors.trees import Tree

# By name, so that nothing is imported.
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


class Objective(nn.Module):
    """Model and loss in one call, within which both see the same parameters.

    A buffer that the forward replaces instead of writing can be had only from in here, too.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any], has_aux: bool) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.has_aux = has_aux

    def forward(self, inputs: Any, targets: Any) -> tuple[Tensor, Tree, dict[str, Tensor]]:
        if type(inputs) is tuple:
            output = self.model(*inputs)
        elif isinstance(inputs, Mapping):
            output = self.model(**inputs)
        else:
            output = self.model(inputs)
        returned = self.loss_fn(output, *targets)
        loss, aux = self._split(returned) if self.has_aux else (returned, ())
        if not isinstance(loss, Tensor):
            hint = "; for (loss, aux) set has_aux=True" if isinstance(loss, tuple) else ""
            raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}{hint}")
        if not loss.is_floating_point():
            raise TypeError(f"loss_fn must return a floating-point loss, got {loss.dtype}")
        if loss.ndim:
            raise ValueError(
                f"loss_fn must return a 0-d loss, got shape {tuple(loss.shape)}; take its mean"
            )
        return loss, aux, dict(self.model.named_buffers())

    def _split(self, returned: Any) -> tuple[Any, Tree]:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                f"with has_aux=True loss_fn must return (loss, aux), got {type(returned).__name__}"
            )
        loss, aux = returned
        for leaf in trees.leaves_of(aux):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"aux must be a pytree of tensors, got a {type(leaf).__name__} in it"
                )
        return loss, aux


def require_model(model: Any) -> None:
    require_module(model)
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__module__.startswith("torch.") and kind.__name__ in WRAPPERS:
                raise TypeError(f"model: torch.func skips what {kind.__name__} does in backward")
    for name, param in model.named_parameters():
        require_shape(param, f"model: {name!r}")
        if is_dtensor(param):
            raise TypeError(
                f"model: {name!r} is a DTensor, of which train_step cannot make a whole one; "
                "loss.backward() and an optimizer's step take sharded parameters"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no parameter that requires grad")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(
                f"model: module {name!r} has a backward hook, which torch.func refuses"
            )
    require_no_hooks(model)


def require_no_hooks(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            raise ValueError(f"model: {name!r} has a hook, which torch.func would skip")


def require_kept(
    after: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
) -> None:
    """Raise ValueError if a forward replaced a parameter, or made a buffer.

    Args:
        after: What stands at the place of each parameter and buffer now.
        before: What it was called with.
        buffers: The buffers that there were.
        new: The buffers that there are.
    """
    for name, tensor in before.items():
        if name not in buffers and after[name] is not tensor:
            raise ValueError(
                f"the forward of the model replaced {name!r}, so that it would not be trained; "
                "compute with another tensor instead of assigning one"
            )
    for name in new:
        if name not in buffers:
            raise ValueError(
                f"the forward of the model made a buffer {name!r} that was none before, or was "
                "tied; run the model once before train_step, and write tied buffers in place"
            )


def require_loss_fn(loss_fn: Any) -> None:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of the output and targets, got {loss_fn!r}")
    if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
        raise ValueError(
            "loss_fn has trainable parameters of its own, which would not be trained; make it a "
            "part of the model"
        )
