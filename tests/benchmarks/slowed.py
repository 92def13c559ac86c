"""A pytest plugin under which centralization takes much longer, compiled or not."""

from importlib import import_module
from typing import Any

import pytest
from torch import Tensor

# Not the function of that name.
centralize: Any = import_module("gcfunc.centralize")


@pytest.fixture(autouse=True)
def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = centralize._less_mean

    def slow(g: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ordered = g.flatten()
        for _ in range(20):
            ordered = ordered.sort(descending=True).values.sort().values
        return quick(g, *args, **kwargs) + 1e-30 * ordered.view_as(g)

    monkeypatch.setattr(centralize, "_less_mean", slow)
