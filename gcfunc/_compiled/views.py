"""In which view a compiled graph gets a tensor, so that Inductor can update it in place."""

from collections.abc import Callable

from torch import Tensor

from gcfunc._centralization.formula import ROWS, Projection, Units
from gcfunc._tensors.lists import Tensors
from gcfunc._tensors.versions import LOSES_0D_FLOAT64

View = Callable[[Tensor], Tensor]


def view_for(projection: Projection | None, written: Tensors) -> View:
    """The view of a parameter, its slots and its gradient; ``written`` are the former two."""
    if written[0].ndim == 0 and LOSES_0D_FLOAT64:
        return as_vector
    return turned if projection == ROWS and any(t.is_contiguous() for t in written) else as_it_is


def viewed(projection: Projection | None, view: View, ndim: int) -> Projection | None:
    """How a tensor is centralized in that view."""
    return Units(ndim - 1) if view is turned else projection


def as_it_is(t: Tensor) -> Tensor:
    """The tensor itself, for which no history is recorded."""
    return t.detach()


def turned(t: Tensor) -> Tensor:
    """Its dimensions in reverse.

    On the CPU, Inductor crashes (KeyError: 'bufN') where a mean over rows and the in-place update
    of a contiguous tensor share a graph: https://github.com/pytorch/pytorch/issues/188228. With the
    dimensions reversed the tensor is not contiguous, and the loops come out the same.
    """
    return t.detach().permute(*reversed(range(t.ndim)))


def as_vector(t: Tensor) -> Tensor:
    """A 0-d tensor as a vector, in which Inductor loses no writes."""
    return t.detach().view(1)


def _as_scalar(t: Tensor) -> Tensor:
    return t.view(())


BACK: dict[View, View] = {as_it_is: as_it_is, turned: turned, as_vector: _as_scalar}
"""How a tensor comes out of each view again."""
