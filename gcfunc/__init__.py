"""Gradient centralization for PyTorch: pure functional optimizers, compiled."""

from importlib.metadata import version as _version

from gcfunc import hooks, optim
from gcfunc._algorithms.adagrad import adagrad
from gcfunc._algorithms.adam import adam, adamw
from gcfunc._algorithms.groups import (
    layerwise_lr,
    layerwise_lr_groups,
    no_decay,
    no_decay_groups,
)
from gcfunc._algorithms.lion import lion
from gcfunc._algorithms.lookahead import lookahead, ranger
from gcfunc._algorithms.partition import partition
from gcfunc._algorithms.radam import radam
from gcfunc._algorithms.rmsprop import rmsprop
from gcfunc._algorithms.sgd import sgd, sgdw
from gcfunc._centralization.centralize import centralize
from gcfunc._centralization.formula import Units
from gcfunc._centralization.pack import pack, unpack
from gcfunc._centralization.select import left_out, select
from gcfunc._centralization.where import GC
from gcfunc._compiled.compile import compile  # noqa: A004
from gcfunc._step.checkpoint import load_state_dict, state_dict
from gcfunc._step.hyperparams import update_hyperparams
from gcfunc._step.optimizer import Optimizer
from gcfunc._step.state import State
from gcfunc._tensors.calls import functional_call
from gcfunc._training.step import TrainState, train_step

__all__ = [
    "GC",
    "Optimizer",
    "State",
    "TrainState",
    "Units",
    "adagrad",
    "adam",
    "adamw",
    "centralize",
    "compile",
    "functional_call",
    "hooks",
    "layerwise_lr",
    "layerwise_lr_groups",
    "left_out",
    "lion",
    "load_state_dict",
    "lookahead",
    "no_decay",
    "no_decay_groups",
    "optim",
    "pack",
    "partition",
    "radam",
    "ranger",
    "rmsprop",
    "select",
    "sgd",
    "sgdw",
    "state_dict",
    "train_step",
    "unpack",
    "update_hyperparams",
]
__version__ = _version("gcfunc")
