"""Weights of many widths and layouts, and what every way to step them has to give."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import gcfunc
from gcfunc import GC, Optimizer, State, Units
from tests.cases import Params, random_like

STEPS = 4
LR = 0.004
"""To which a schedule goes on halfway."""
WIDTHS = (1, 3, 9, 64, 147, 1000, 1152, 4608, 8192, 9000)
"""Of rows: of depthwise and usual layers, powers of 2 and none, and more than one block holds."""
TURNED = Units(dim=1, groups=2)
"""As of a transposed convolution in two groups."""

KINDS: dict[str, tuple[int, ...]] = {
    **{f"rows of {width}": (3, width) for width in WIDTHS},
    "filters": (4, 3, 7, 7),
    "channels_last": (4, 3, 3, 3),
    "turned": (4, 6, 2, 2),
    "vector": (5,),
    "scalar": (),
    "no rows": (0, 3),
    "no width": (3, 0),
}


def where(name: str, weight: Tensor) -> Units | bool:
    return TURNED if name == "turned" else weight.ndim > 1


BACKWARD, UPDATE = GC(where), GC(where, at="update")


def weights(dtype: torch.dtype = torch.float32) -> Params:
    """One of each kind, on the CPU."""
    random = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in KINDS.items()}
    name = "channels_last"
    params[name] = params[name].contiguous(memory_format=torch.channels_last)
    return params


def gradients(params: Params, seed: int) -> Params:
    """In the layout that autograd gives them, that of their weights."""
    return {n: torch.empty_like(params[n]).copy_(g) for n, g in random_like(params, seed).items()}


def each(change: Callable[[Tensor], Tensor], tree: Mapping[str, Any]) -> dict[str, Any]:
    """``None`` stays."""
    return {name: t if t is None else change(t) for name, t in tree.items()}


def moved(tree: Mapping[str, Any], device: str) -> dict[str, Any]:
    """A copy that is there."""
    return each(lambda t: t.detach().to(device, copy=True), tree)


def changed(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """A state with other slots."""
    slots = {slot: each(change, values) for slot, values in state.slots.items()}
    return state._replace(slots=slots)


def wide(t: Tensor) -> Tensor:
    """On the CPU, where the reference is."""
    return t.detach().cpu().double()


def scalars_on_the_cpu(state: State) -> State:
    return state._replace(step=state.step.cpu(), hyperparams=each(Tensor.cpu, state.hyperparams))


def everything(params: Any, state: State) -> Params:
    """Params and slots under their original names, wide and on the CPU."""
    scalars = ("step", "hyperparams.")
    slots = {n: t for n, t in gcfunc.state_dict(state).items() if not n.startswith(scalars)}
    if isinstance(params, dict):
        return each(wide, params | slots)
    return each(wide, gcfunc.unpack(params) | slots)


def slower(state: State) -> State:
    """With another learning rate, as a schedule gives it."""
    return gcfunc.update_hyperparams(state, lr=LR)


def expected(
    opt: Optimizer,
    start: Params,
    batches: Sequence[Mapping[str, Any]],
    halfway: Callable[[State], State] | None = None,
) -> Params:
    """The eager step in float64 on the CPU, its state changed ``halfway``."""
    return stepped(opt, each(wide, start), [each(wide, grads) for grads in batches], halfway)


def stepped(
    opt: Any, params: Any, batches: Sequence[Any], halfway: Callable[[State], State] | None = None
) -> Params:
    """All that an optimizer, compiled or not, makes of params where they are."""
    state = opt.init(params)
    for t, grads in enumerate(batches):
        if halfway and t == len(batches) // 2:
            state = halfway(state)
        params, state = opt.step(params, grads, state)
    return everything(params, state)


def distance(have: Params, want: Params) -> float:
    """The largest, to numbers of 1 and below absolute, above relative."""
    assert have.keys() == want.keys()
    each = [
        ((have[name] - t).abs() / t.abs().clamp(min=1)).max()
        for name, t in want.items()
        if t.numel()
    ]
    return float(torch.stack(each).max())


def require(have: Params, want: Params, without: Params, tolerance: float = 1e-4) -> None:
    """As it should be, and not what it were without GC."""
    difference = distance(have, {name: want[name] for name in have})
    assert difference <= tolerance, difference
    assert distance(have, {name: without[name] for name in have}) > 1e-3
