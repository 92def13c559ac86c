"""What must not get through the gates, put into gcfunc by private names, all of them here."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gcfunc._centralization import formula
from gcfunc._centralization.kinds import centralize_list, centralize_one
from gcfunc._compiled.graph import INDUCTOR_OPTIONS
from gcfunc._compiled.planned import Planned


def slow_centralization(patch: pytest.MonkeyPatch) -> None:
    """Compiled or not."""
    quick = formula.project

    def slow(g: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ordered = g.flatten()
        for _ in range(20):
            ordered = ordered.sort(descending=True).values.sort().values
        return quick(g, *args, **kwargs) + 1e-30 * ordered.view_as(g)

    patch.setattr(formula, "project", slow)


def graph_break(patch: pytest.MonkeyPatch) -> None:
    """In a compiled step."""

    def broken(*args: Any) -> Any:
        torch._dynamo.graph_break()
        return centralize_list(*args)

    patch.setattr("gcfunc._algorithms.pipeline.centralize_list", broken)


def written_and_read_again(patch: pytest.MonkeyPatch) -> None:
    """What one kernel could do, by several."""
    patch.setitem(INDUCTOR_OPTIONS, "realize_reads_threshold", 4)
    patch.setitem(INDUCTOR_OPTIONS, "realize_opcount_threshold", 30)


def allocation(patch: pytest.MonkeyPatch) -> None:
    """Of 40 bytes, in a donated step."""
    step = Planned.step

    def allocating(*args: Any) -> None:
        torch.empty(10)
        step(*args)

    patch.setattr(Planned, "step", allocating)


def all_reduce(patch: pytest.MonkeyPatch) -> None:
    """One for each gradient that hooks centralize."""

    def centralize(grad: Tensor, unit: Any) -> Tensor:
        dist.all_reduce(torch.zeros(1))
        return centralize_one(grad, unit)

    patch.setattr("gcfunc.hooks.mechanisms.centralize_one", centralize)
