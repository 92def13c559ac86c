"""The formula of gradient centralization, and the idea of this library.

A Linear layer computes each output from one row of its weight, a convolution from one filter. Call
an output together with the weights that belong to it an *output unit*. Gradient centralization
(Yong et al. 2020, https://arxiv.org/abs/2004.01461) subtracts from the gradient of each output
unit its mean. This is a projection onto the hyperplane of zero mean: it is linear, and doing it
twice is doing it once.

It is one line. What it costs depends on where that line stands, and the library follows from three
observations.

- An optimizer reads every gradient anyway. So the line belongs in the optimizer's step, next to
  the rest of its arithmetic: a pure function from params, gradients and state to the next ones
  (``_step``, ``_algorithms``), which a compiler turns into few kernels (``_compiled``).
- It acts on rows. A row of K numbers is the same problem whichever weight it is from, so that a
  model can be stepped as a few large matrices (``pack``), and a process that holds a part of a row
  needs no more of the others than its sum (``ShardedUnits``).
- It is linear. So it may as well be done while backward runs, to each gradient by itself and
  before they are added up or averaged (``hooks``), for an optimizer that knows nothing of it.

Every way to use the library ends at :func:`project`; nothing else subtracts a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


def project(g: Tensor, dims: Sequence[int], mean: Callable[..., Tensor] = torch.mean) -> Tensor:
    """The formula: ``g`` less its mean over ``dims``, those along which one unit's weights lie."""
    return g - mean(g, dims, keepdim=True)


class Projection:
    """How one tensor is centralized. Each kind knows by itself; nobody asks which kind it is."""

    pieces: tuple[tuple[Any, Projection | None], ...] = ()
    """Of a packed tensor whose weights differ in their projections: each piece with its own."""
    communicates: ClassVar[bool] = False
    """Whether processes talk to each other in :meth:`project`."""

    def project(self, g: Tensor) -> Tensor:
        """``g`` centralized."""
        raise NotImplementedError


@dataclass(frozen=True)
class Units(Projection):
    """Which entries of a weight belong to one output unit.

    Args:
        dim: The dimension that counts output units. 0 for Linear and Conv weights, 1 for
            transposed convolutions, whose dimension 0 is the input.
        groups: Into how many equal blocks dimension 0 falls, each with output units of its own:
            a transposed convolution's ``groups``. A forward convolution keeps 1 whatever its
            groups, because each of its rows already is one unit.

    Example:
        >>> import torch, gcfunc
        >>> g = torch.arange(6.0).reshape(2, 3)
        >>> gcfunc.centralize(g, where=lambda name, tensor: gcfunc.Units(dim=1))
        tensor([[-1.5000, -1.5000, -1.5000],
                [ 1.5000,  1.5000,  1.5000]])
    """

    dim: int = 0
    groups: int = 1

    def project(self, g: Tensor) -> Tensor:
        """``g`` centralized."""
        if self.groups > 1:
            blocks = g.reshape(self.groups, g.shape[0] // self.groups, *g.shape[1:])
            dims = [dim for dim in range(1, blocks.ndim) if dim != self.dim + 1]
            return project(blocks, dims).reshape(g.shape)
        return project(g, self.inputs(g.ndim))

    def inputs(self, ndim: int) -> list[int]:
        """The dimensions of a weight along which one output unit's lie, blocks aside."""
        return [dim for dim in range(ndim) if dim != self.dim]

    def fit(self, weight: Tensor) -> bool:
        """Whether a weight of at least 2 dimensions can be cut up like this."""
        return (
            0 <= self.dim < weight.ndim and self.groups >= 1 and weight.shape[0] % self.groups == 0
        )


ROWS = Units()
