"""Every algorithm of the library, a row each: what exists, what it equals, what it is tried with.

Tests, benchmarks, the ``gcfunc train`` command, MMEngine's registration and README's table are made
from these rows. A constructor or a class that is exported and has no row fails a test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import gcfunc
from gcfunc import GC, Optimizer, optim
from gcfunc.optim.base import DropIn

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Algorithm:
    """One row.

    Attributes:
        constructor: The functional constructor.
        drop_in: The class in :mod:`gcfunc.optim`.
        variants: Arguments to try it with, by a word that tells them apart. Together they have
            every option on.
        training: Common settings. The defaults of ``gcfunc train``, near the best for its network
            without centralization: a learning rate that only suits the centralized network would
            make any comparison look good. Benchmarks measure it with these, too.
        decay: Whether weight decay joins the gradient, unless an option says otherwise, or the
            update.
        twin: Torch's class of the same mathematics and options, if it has one.
        options: What to hold it against torch's class with: two values of each option.
        reference: The reference's names for it, under which :mod:`gcfunc.optim` has it too.
        around: For what wraps another algorithm, the row of one to try it with. Options that are
            not its own are that one's.
        nearest: The row whose class of torch's does what is nearest, if torch has none of its own.
        nearest_fused: Likewise among those of which torch has a fused step, if it has none of this
            one.
    """

    constructor: Callable[..., Optimizer]
    drop_in: type[DropIn]
    variants: Mapping[str, Options]
    training: Options
    decay: Literal["coupled", "decoupled"]
    twin: Callable[..., torch.optim.Optimizer] | None = None
    options: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    reference: tuple[str, ...] = ()
    around: str | None = None
    nearest: str | None = None
    nearest_fused: str | None = None

    def make(self, *, gc: GC | str | None = None, **options: Any) -> Optimizer:
        """The functional optimizer with these options."""
        own, inner = self._own(options)
        if self.around is None:
            return self.constructor(**own, gc=gc)
        return self.constructor(CATALOG[self.around].make(gc=gc, **inner), **own)

    def make_drop_in(self, params: Any, **options: Any) -> DropIn:
        """The ``torch.optim.Optimizer`` with these options, ``gc`` and ``compile`` among them."""
        if self.around is None:
            return self.drop_in(params, **options)
        own, inner = self._own(options)
        return self.drop_in(CATALOG[self.around].make_drop_in(params, **inner), **own)

    def takes(self, option: str) -> bool:
        """Whether there is such an option."""
        return option in inspect.signature(self.constructor).parameters or (
            self.around is not None and CATALOG[self.around].takes(option)
        )

    def _own(self, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its own options, and those of what it wraps."""
        if self.around is None:
            return dict(options), {}
        names = {*inspect.signature(self.constructor).parameters}
        own = {name: value for name, value in options.items() if name in names}
        return own, {name: value for name, value in options.items() if name not in names}


_DECAY = {"weight_decay": (0.0, 1.0)}
_BETAS = {"betas": ((0.9, 0.999), (0.5, 0.8))}
_ADAM = _BETAS | {"eps": (1e-8, 0.1)} | _DECAY | {"amsgrad": (False, True)}

CATALOG: dict[str, Algorithm] = {
    "sgd": Algorithm(
        gcfunc.sgd,
        optim.SGD,
        {
            "": {"lr": 0.1, "weight_decay": 0.01},
            "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        },
        training={"lr": 0.02, "weight_decay": 5e-4, "momentum": 0.9},
        decay="coupled",
        twin=torch.optim.SGD,
        options={
            "momentum": (0.0, 0.9),
            "dampening": (0.0, 0.3),
            **_DECAY,
            "nesterov": (False, True),
        },
        reference=("SGD_GC", "SGD_GCC"),
    ),
    "sgdw": Algorithm(
        gcfunc.sgdw,
        optim.SGDW,
        {
            "": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        },
        training={"lr": 0.02, "weight_decay": 5e-4, "momentum": 0.9},
        decay="decoupled",
        reference=("SGDW_GC", "SGDW_GCC"),
        nearest="sgd",
    ),
    "adam": Algorithm(
        gcfunc.adam,
        optim.Adam,
        {
            "": {"lr": 0.01, "weight_decay": 0.01},
            "amsgrad": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "amsgrad": True},
        },
        training={"lr": 2e-3, "weight_decay": 5e-4},
        decay="coupled",
        twin=torch.optim.Adam,
        options=_ADAM,
        reference=("Adam_GC", "Adam_GCC", "Adam_GC2", "Adam_GCC2"),
    ),
    "adamw": Algorithm(
        gcfunc.adamw,
        optim.AdamW,
        {"": {"lr": 0.01, "weight_decay": 0.1}},
        training={"lr": 2e-3, "weight_decay": 1e-2},
        decay="decoupled",
        twin=torch.optim.AdamW,
        options=_ADAM,
        reference=("AdamW_GC", "AdamW_GCC", "AdamW_GC2", "AdamW_GCC2"),
    ),
    "adagrad": Algorithm(
        gcfunc.adagrad,
        optim.Adagrad,
        {
            "": {
                "lr": 0.1,
                "lr_decay": 0.01,
                "weight_decay": 0.01,
                "initial_accumulator_value": 0.1,
            }
        },
        training={"lr": 1e-2, "weight_decay": 5e-4},
        decay="coupled",
        twin=torch.optim.Adagrad,
        options={
            "lr_decay": (0.0, 0.5),
            **_DECAY,
            "initial_accumulator_value": (0.0, 1.0),
            "eps": (1e-10, 0.1),
        },
        reference=("Adagrad_GC", "Adagrad_GCC"),
    ),
    "radam": Algorithm(
        gcfunc.radam,
        optim.RAdam,
        {
            "": {"lr": 0.01, "weight_decay": 0.01},
            "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
        },
        training={"lr": 1e-2, "weight_decay": 5e-4},
        decay="coupled",
        twin=torch.optim.RAdam,
        options={
            **_BETAS,
            "eps": (1e-8, 1.0),
            **_DECAY,
            "decoupled_weight_decay": (False, True),
        },
        nearest_fused="adam",
    ),
    "rmsprop": Algorithm(
        gcfunc.rmsprop,
        optim.RMSprop,
        {
            "": {"lr": 0.01, "weight_decay": 0.01},
            "centered": {"lr": 0.01, "alpha": 0.8, "eps": 0.1, "momentum": 0.9, "centered": True},
        },
        training={"lr": 1e-3, "weight_decay": 5e-4, "momentum": 0.0},
        decay="coupled",
        twin=torch.optim.RMSprop,
        options={
            "alpha": (0.99, 0.9),
            "eps": (1e-8, 0.1),
            **_DECAY,
            "momentum": (0.0, 0.9),
            "centered": (False, True),
        },
        nearest_fused="adam",
    ),
    "lion": Algorithm(
        gcfunc.lion,
        optim.Lion,
        {"": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}},
        training={"lr": 1e-3, "weight_decay": 5e-2},
        decay="decoupled",
        nearest="sgd",
    ),
    "lookahead": Algorithm(
        gcfunc.lookahead,
        optim.Lookahead,
        {"": {"lr": 0.1, "momentum": 0.9, "k": 3, "alpha": 0.5}},
        training={"lr": 0.02, "weight_decay": 5e-4, "momentum": 0.9},
        decay="coupled",
        around="sgd",
        nearest="sgd",
    ),
    "ranger": Algorithm(
        gcfunc.ranger,
        optim.Ranger,
        {
            "": {
                "lr": 0.01,
                "betas": (0.9, 0.99),
                "eps": 1e-6,
                "weight_decay": 0.1,
                "k": 3,
                "alpha": 0.7,
            }
        },
        training={"lr": 2e-2, "weight_decay": 1e-2},
        decay="decoupled",
        nearest="radam",
        nearest_fused="adam",
    ),
}
