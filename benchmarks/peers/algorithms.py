"""Every algorithm as gcfunc has it, as torch does, and what is nearest where torch has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gcfunc import GC, Optimizer
from gcfunc._catalog import CATALOG, Algorithm

LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4

COMPARED = ("sgd", "adamw", "adagrad")
"""The algorithms that everyone has."""


def settings(row: Algorithm) -> dict[str, Any]:
    """What an algorithm is measured with: its defaults, and momentum where that is common."""
    common = {"momentum": MOMENTUM, "weight_decay": DECAY} if row.training.get("momentum") else {}
    return {"lr": LR, **common}


def _ours(row: Algorithm) -> Callable[[GC | str | None], Optimizer]:
    return lambda gc: row.make(gc=gc, **settings(row))


def _torch(
    make: Callable[..., torch.optim.Optimizer], row: Algorithm
) -> Callable[..., torch.optim.Optimizer]:
    return lambda ps, **how: make(ps, **settings(row), **how)


OURS = {name: _ours(row) for name, row in CATALOG.items()}
TORCH = {name: _torch(row.twin, row) for name, row in CATALOG.items() if row.twin}
NEAREST = {name: row.nearest for name, row in CATALOG.items() if row.nearest}
"""What torch has for algorithms that it lacks."""
NEAREST_FUSED = NEAREST | {n: r.nearest_fused for n, r in CATALOG.items() if r.nearest_fused}
"""What it has a fused step for."""
DROP_INS = {name: _torch(row.make_drop_in, row) for name, row in CATALOG.items()}
