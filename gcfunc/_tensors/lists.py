"""List arithmetic: the elementwise operations every algorithm is written in.

Each operation is one multi-tensor ``torch._foreach_*`` call, the operators of torch's own
optimizers, wherever these allow it. They have no batching rule for ``torch.func.vmap``, and no
derivative with respect to a scalar (https://github.com/pytorch/pytorch/issues/144580); compiled for
a GPU, Inductor fuses no mean with them. There the same operation runs tensor by tensor.

A *scalar* is a 0-d tensor that already has the dtype and device of the list, so that no operation
promotes a dtype and no hyperparameter becomes a constant of a compiled graph.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]


# Private, as all of torch._C: torch.func has no public way to ask which transforms are active, nor
# for what autograd has recorded of a tensor inside of vmap.
def _transforms() -> list[bool]:
    """For each transform of torch.func that is active here, whether it is vmap."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return [level.key() == torch._C._functorch.TransformType.Vmap for level in stack]


def _transformed() -> bool:
    return bool(_transforms())


def _under_vmap() -> bool:
    return any(_transforms())


def under_grad() -> bool:
    """Whether a transform of torch.func is active here that differentiates, or another but vmap."""
    return not all(_transforms())


def unbatched(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """Tensors as they are outside of all vmaps that are active here."""
    for _ in _transforms():
        tensors = map(_unbatched, tensors)
    return tensors


def _unbatched(t: Tensor) -> Tensor:
    functorch = torch._C._functorch
    return functorch.get_unwrapped(t) if functorch.is_batchedtensor(t) else t


# torch leaves the function unannotated.
under_vmap: Callable[[], bool] = torch.compiler.assume_constant_result(  # type: ignore[no-untyped-call]
    _under_vmap
)
"""Whether a ``torch.func.vmap`` is active here.

A constant in a compiled graph: torch.compile enters the transforms for real while it traces.
"""


transformed: Callable[[], bool] = torch.compiler.assume_constant_result(  # type: ignore[no-untyped-call]
    _transformed
)
"""Whether a transform of torch.func is active here; likewise a constant."""

_apart: ContextVar[bool] = ContextVar("tensor by tensor", default=False)


@contextlib.contextmanager
def tensor_by_tensor() -> Iterator[None]:
    """No multi-tensor operations here: what is traced is to be read."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


# As under_vmap.
_one_by_one: Callable[[], bool] = torch.compiler.assume_constant_result(  # type: ignore[no-untyped-call]
    lambda: _apart.get() or _under_vmap()
)


def _fuses_foreach(device: torch.device) -> bool:
    """Whether multi-tensor operations become one kernel with the rest of what is computed."""
    return device.type not in ("cuda", "xpu") or not torch.compiler.is_compiling()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic on ``dtype`` is done in: float32 for the 16-bit ones, else itself."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _lift(
    foreach: Callable[..., Sequence[Tensor]], each: Callable[..., Tensor]
) -> Callable[..., Tensors]:
    def operation(xs: Tensors, *args: Any) -> Tensors:
        if not xs:
            return []
        requires_grad = any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if not (_one_by_one() or requires_grad) and _fuses_foreach(xs[0].device):
            return list(foreach(xs, *args))
        columns = [a if isinstance(a, list) else [a] * len(xs) for a in args]
        return [each(*row) for row in zip(xs, *columns, strict=True)]

    return operation


def _foreach_add(xs: Tensors, y: Tensors | Tensor) -> Sequence[Tensor]:
    # Given a scalar, torch's reads its value: it would be a constant of a compiled graph, and its
    # tangent 0.
    return torch._foreach_add(xs, [y] * len(xs) if isinstance(y, Tensor) else y)


add = _lift(_foreach_add, torch.add)
"""``x + y``; y a list or a scalar."""
sub = _lift(torch._foreach_sub, torch.sub)
"""``x - y``; y a list."""
mul = _lift(torch._foreach_mul, torch.mul)
"""``x * y``; y a list or a scalar."""
div = _lift(torch._foreach_div, torch.div)
"""``x / y``; y a list or a scalar."""
maximum = _lift(torch._foreach_maximum, torch.maximum)
"""The larger of x and y; y a list."""
sign = _lift(torch._foreach_sign, torch.sign)
"""-1, 0 or 1."""
_sqrt = _lift(torch._foreach_sqrt, torch.sqrt)
_clamp_min = _lift(torch._foreach_clamp_min, torch.clamp_min)


def nonnegative(xs: Tensors) -> Tensors:
    """The larger of x and 0."""
    return _clamp_min(xs, 0.0)


def sqrt(xs: Tensors) -> Tensors:
    """Square root whose derivative at 0 is finite.

    The smallest normal number is added first. It vanishes against every x above 1e-30 in float32,
    and below that the root does against any usual eps. A second moment of exactly 0 (a dead unit,
    an unseen embedding row) then has the derivative ``big * 0 = 0`` where it would have had
    ``inf * 0 = nan``.
    """
    if not xs:
        return []
    tiny = torch.full((), torch.finfo(xs[0].dtype).tiny, dtype=xs[0].dtype, device=xs[0].device)
    return _sqrt(add(xs, tiny))


def average(xs: Tensors, keep: Tensor, ys: Tensors, take: Tensor) -> Tensors:
    """Moving average, ``keep * x + take * y``."""
    return add(mul(xs, keep), mul(ys, take))


def numbers_copied(numbers: Tensors) -> Tensors:
    """Copies of 0-d tensors of one dtype: on a GPU in one launch, and so in one storage.

    Where autograd records, each has one of its own: writing to one would touch the others.
    """
    recorded = torch.is_grad_enabled() and any(number.requires_grad for number in numbers)
    if not numbers or numbers[0].device.type == "cpu" or recorded:
        return [number.clone() for number in numbers]
    return list(torch.stack(numbers).unbind())


def where(condition: Tensor, xs: Tensors, ys: Tensors) -> Tensors:
    """All of x if the scalar condition is true, all of y otherwise."""
    return [torch.where(condition, x, y) for x, y in zip(xs, ys, strict=True)]
