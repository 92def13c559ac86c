"""States as flat dicts of tensors, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gcfunc._step.state import State, require_state
from gcfunc._tensors import sharding
from gcfunc._tensors.packed import Packed, SlotValues, pack_like, unpacked
from gcfunc._tensors.trees import require_names


def state_dict(state: State) -> dict[str, Tensor]:
    """A state as a flat ``{name: tensor}``, fit for any checkpoint format.

    The names are ``"step"``, ``"hyperparams.lr"`` and so on, and ``"exp_avg.conv.weight"`` for
    the slot ``exp_avg`` of the parameter ``conv.weight``. The tensors are detached and contiguous
    but otherwise the state's own: save them, or clone them, before a donated step writes them.

    Works with ``torch.save`` and ``torch.load(..., weights_only=True)``, with safetensors and with
    ``torch.distributed.checkpoint``.

    Example:
        >>> import torch, gcfunc
        >>> state = gcfunc.sgd(lr=0.1, momentum=0.9).init({"w": torch.ones(2)})
        >>> list(gcfunc.state_dict(state))[-2:]
        ['hyperparams.dampening', 'momentum_buffer.w']
    """
    return {name: tensor.detach().contiguous() for name, tensor in _named(state).items()}


def load_state_dict(state: State, d: Mapping[str, Tensor]) -> State:
    """The state that ``d`` holds, laid out like ``state``.

    Args:
        state: A state of the same optimizer and params, usually fresh from ``opt.init(params)``;
            it gives structure, devices, strides and sharding, and is not changed.
        d: What :func:`state_dict` gave, sharded in whatever way or not at all.

    Returns:
        A new state with its own storage. Training goes on from it bit-exactly.

    Raises:
        TypeError: ``state`` is no state, or ``d`` no mapping.
        ValueError: ``d`` is of another algorithm, structure, shape or dtype; the message lists the
            names that differ.

    Example:
        >>> import torch, gcfunc
        >>> opt, params = gcfunc.sgd(lr=0.1, momentum=0.9), {"w": torch.ones(2)}
        >>> params, state = opt.step(params, params, opt.init(params))
        >>> gcfunc.load_state_dict(opt.init(params), gcfunc.state_dict(state)).step
        tensor(1)
    """
    own = _named(state)
    if not isinstance(d, Mapping):
        raise TypeError(f"d must map names to tensors, got {type(d).__name__}")
    require_names([*d], [*own], "the checkpoint", "the state")
    wrong = [
        f"{name!r} is {_describe(d[name])}, expected {_describe(tensor)}"
        for name, tensor in own.items()
        if not isinstance(d[name], Tensor) or _describe(d[name]) != _describe(tensor)
    ]
    if wrong:
        raise ValueError("the checkpoint does not match the state: " + "; ".join(wrong))
    new = {
        name: torch.empty_like(t).copy_(sharding.spread(d[name].detach(), like=t))
        for name, t in own.items()
    }
    return State(
        new["step"],
        {name: new[f"hyperparams.{name}"] for name in state.hyperparams},
        {
            slot: _slot_values({n: new[f"{slot}.{n}"] for n in unpacked(values)}, values)
            for slot, values in state.slots.items()
        },
    )


def _named(state: State) -> dict[str, Tensor]:
    require_state(state)
    return (
        {"step": state.step}
        | {f"hyperparams.{name}": scalar for name, scalar in state.hyperparams.items()}
        | {
            f"{slot}.{n}": t
            for slot, values in state.slots.items()
            for n, t in unpacked(values).items()
        }
    )


def _slot_values(tensors: dict[str, Tensor], like: SlotValues) -> SlotValues:
    if isinstance(like, Packed):
        for piece in (piece for packed in like.layout.tensors for piece in packed.pieces):
            first, *others = piece.names
            for other in others:
                if not torch.equal(tensors[first], tensors[other]):
                    raise ValueError(
                        f"the checkpoint differs between {first!r} and {other!r}, which are tied"
                    )
                tensors[other] = tensors[first]
    return pack_like(tensors, like.layout) if isinstance(like, Packed) else tensors


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    where = " on meta" if tensor.is_meta else ""
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype} {tuple(tensor.shape)}{layout}{where}"
