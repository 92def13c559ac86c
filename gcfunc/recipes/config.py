"""What a training run is asked to do: everything its result depends on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import gcfunc
from gcfunc._catalog import CATALOG
from gcfunc._centralization.where import RULES
from gcfunc.recipes.errors import UsageError

Schedule = Literal["cosine", "constant"]
Mode = Literal["functional", "hooks"]


DATASETS = ("mnist", "digits")
SCHEDULES = ("cosine", "constant")
MODES = ("functional", "hooks")


@dataclass(frozen=True)
class Config:
    """A request, complete: :meth:`from_options` fills in what depends on the optimizer."""

    lr: float
    weight_decay: float
    momentum: float | None
    nesterov: bool = False
    optimizer: str = "sgd"
    gc: str = "gc"
    at: Literal["gradient", "update"] = "gradient"
    schedule: Schedule = "cosine"
    dataset: str = "mnist"
    data: str | None = None
    limit: int | None = None
    epochs: int = 8
    batch_size: int = 64
    seed: int = 0
    seeds: int = 1
    compare: bool = False
    eager: bool = False
    mode: Mode = "functional"
    ddp: bool = False
    fsdp: bool = False

    @classmethod
    def from_options(cls, **options: Any) -> "Config":
        """A config from the options that were given, and defaults for the others.

        Raises:
            UsageError: options that do not go together, or values out of bounds.
        """
        algorithm = CATALOG[options.get("optimizer", cls.optimizer)]
        for option in ("momentum", "nesterov"):
            if option in options and not algorithm.takes(option):
                raise UsageError(f"{options['optimizer']} does not take --{option}")
        if options.get("gc") == "none" and options.get("compare"):
            choices = " or ".join(f"--gc {name}" for name in RULES)
            raise UsageError(f"--compare needs something to compare with: {choices}")
        if options.get("gc") == "none" and "at" in options:
            raise UsageError("--at says where to centralize, and --gc none does not")
        if {"ddp", "fsdp"} & options.keys() and options.setdefault("mode", "hooks") != "hooks":
            raise UsageError("--ddp and --fsdp share out a module, so they need --mode hooks")
        if options.get("mode") == "hooks":
            if options.get("at") == "update":
                raise UsageError("--at update needs --mode functional: hooks see gradients only")
            if algorithm.twin is None:
                raise UsageError(
                    f"--mode hooks trains with torch.optim, which has no {options['optimizer']}; "
                    f"it has {', '.join(name for name, row in CATALOG.items() if row.twin)}"
                )
        if {"data", "dataset"} <= options.keys():
            raise UsageError("--data and --dataset both name a dataset; give one")
        if "data" in options:
            options["data"] = str(Path(options["data"]).resolve())
        defaults = {
            "momentum": None,
            **algorithm.training,
            "seeds": 5 if options.get("compare") else 1,
        }
        config = cls(**(defaults | options))
        for variant in config.variants:
            config.build(variant)
        return config

    @property
    def variants(self) -> tuple[str, ...]:
        """The kinds of centralization to train with, in the order of the report."""
        return ("none", self.gc) if self.compare else (self.gc,)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Every ``(gc, seed)`` to train, those of one seed next to each other."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(gc, seed) for seed in seeds for gc in self.variants]

    @property
    def parallel(self) -> str | None:
        """The option that has several processes train together, if one was given."""
        return "ddp" if self.ddp else "fsdp" if self.fsdp else None

    def build(self, gc: str) -> gcfunc.Optimizer:
        """The functional optimizer, centralizing as ``gc`` says.

        Raises:
            UsageError: a hyperparameter is out of bounds.
        """
        options = self._hyperparams()
        if gc != "none":
            options["gc"] = gcfunc.GC(where=gc, at=self.at)
        try:
            return CATALOG[self.optimizer].make(**options)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def build_torch(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The same optimizer of torch's, without centralization."""
        make = CATALOG[self.optimizer].twin
        assert make is not None  # from_options refuses it
        return make(params, **self._hyperparams(), foreach=True)

    def _hyperparams(self) -> dict[str, Any]:
        hyperparams: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.momentum is not None:
            hyperparams["momentum"] = self.momentum
        if self.nesterov:
            hyperparams["nesterov"] = True
        return hyperparams

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)
