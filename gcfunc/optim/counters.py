"""How many steps parameters have taken, as ``optimizer.state`` tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Entry = dict[str, Any]
"""What ``optimizer.state`` has for one parameter."""


def count_of(entry: Entry) -> int:
    """How many steps a parameter has taken."""
    if "step" in entry:
        return int(entry["step"])
    return int(entry.get("momentum_buffer") is not None)


class Counters:
    """The ``"step"`` of parameters that have taken equally many steps.

    torch gives each parameter a counter of its own, a 0-d tensor. Here they are views of one
    vector, or of one for each dtype, so that one operation counts all of them up. Those that
    processes share stay where they are, so that all count in the same memory.
    """

    def __init__(self, entries: Sequence[Entry], count: int) -> None:
        private: dict[torch.dtype, list[Entry]] = {}
        for entry in entries:
            if not _is_shared(step := entry.get("step")):
                private.setdefault(_dtype(step), []).append(entry)
        vectors = []
        for dtype, alike in private.items():
            vectors.append(torch.full((len(alike),), float(count), dtype=dtype, device="cpu"))
            for entry, view in zip(alike, vectors[-1].unbind(), strict=True):
                entry["step"] = view
        self._own: list[Tensor] = [entry["step"] for entry in entries]
        self._places = _places(self._own)
        self._tensors = [*vectors, *filter(_is_shared, self._own)]

    def say(self, count: int) -> bool:
        """Whether each counter still says so. Others may write them, in other processes too."""
        return self._places == _places(self._own) and all(
            {*t.reshape(-1).tolist()} <= {count} for t in self._tensors
        )

    def add_one(self) -> None:
        """Count one more step."""
        for t in self._tensors:
            t.add_(1)


def _is_shared(step: Any) -> bool:
    # Of a tensor on another device is_shared() is always true.
    if not isinstance(step, Tensor) or step.device.type != "cpu":
        return False
    shared: bool = step.is_shared()  # type: ignore[no-untyped-call]
    return shared


def _dtype(step: Any) -> torch.dtype:
    """Its own, or what torch gives a counter: in a default of 16 bits it would stop at 256."""
    floats = {torch.float32, torch.float64}
    if isinstance(step, Tensor) and step.dtype in floats:
        return step.dtype
    default = torch.get_default_dtype()
    return default if default in floats else torch.float32


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
