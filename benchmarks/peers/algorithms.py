"""Every algorithm as gcfunc has it, as torch does, and what is nearest where torch has none."""

from __future__ import annotations

from collections.abc import Callable

import torch

import gcfunc
from gcfunc import GC, Optimizer

LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4

COMPARED = ("sgd", "adamw", "adagrad")
"""The algorithms that everyone has."""

OURS: dict[str, Callable[[GC | str | None], Optimizer]] = {
    "sgd": lambda gc: gcfunc.sgd(LR, MOMENTUM, weight_decay=DECAY, gc=gc),
    "sgdw": lambda gc: gcfunc.sgdw(LR, MOMENTUM, weight_decay=DECAY, gc=gc),
    "adam": lambda gc: gcfunc.adam(LR, gc=gc),
    "adamw": lambda gc: gcfunc.adamw(LR, gc=gc),
    "adagrad": lambda gc: gcfunc.adagrad(LR, gc=gc),
    "radam": lambda gc: gcfunc.radam(LR, gc=gc),
    "lookahead": lambda gc: gcfunc.lookahead(OURS["sgd"](gc)),
    "ranger": lambda gc: gcfunc.ranger(LR, gc=gc),
}
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda ps, **kw: torch.optim.SGD(ps, LR, MOMENTUM, weight_decay=DECAY, **kw),
    "adam": lambda ps, **kw: torch.optim.Adam(ps, LR, **kw),
    "adamw": lambda ps, **kw: torch.optim.AdamW(ps, LR, **kw),
    "adagrad": lambda ps, **kw: torch.optim.Adagrad(ps, LR, **kw),
    "radam": lambda ps, **kw: torch.optim.RAdam(ps, LR, **kw),
}
NEAREST = {"sgdw": "sgd", "lookahead": "sgd", "ranger": "radam"}
"""What torch has for algorithms that it lacks."""
NEAREST_FUSED = NEAREST | {"radam": "adam", "ranger": "adam"}
"""What it has a fused step for."""
DROP_INS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda ps, **kw: gcfunc.optim.SGD(ps, LR, MOMENTUM, weight_decay=DECAY, **kw),
    "sgdw": lambda ps, **kw: gcfunc.optim.SGDW(ps, LR, MOMENTUM, weight_decay=DECAY, **kw),
    "adam": lambda ps, **kw: gcfunc.optim.Adam(ps, LR, **kw),
    "adamw": lambda ps, **kw: gcfunc.optim.AdamW(ps, LR, **kw),
    "adagrad": lambda ps, **kw: gcfunc.optim.Adagrad(ps, LR, **kw),
    "radam": lambda ps, **kw: gcfunc.optim.RAdam(ps, LR, **kw),
    "lookahead": lambda ps, **kw: gcfunc.optim.Lookahead(
        gcfunc.optim.SGD(ps, LR, MOMENTUM, weight_decay=DECAY, **kw)
    ),
    "ranger": lambda ps, **kw: gcfunc.optim.Ranger(ps, LR, **kw),
}
