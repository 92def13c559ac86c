"""Gradient centralization for PyTorch: pure functional optimizers, compiled."""

from importlib.metadata import version as _version

from gcfunc import hooks, optim
from gcfunc._optimizer import Optimizer
from gcfunc._types import GC, State, update_hyperparams
from gcfunc.adagrad import adagrad
from gcfunc.adam import adam, adamw
from gcfunc.centralize import Units, centralize
from gcfunc.checkpoint import load_state_dict, state_dict
from gcfunc.compile import compile  # noqa: A004
from gcfunc.groups import layerwise_lr, layerwise_lr_groups, no_decay, no_decay_groups
from gcfunc.lookahead import lookahead, ranger
from gcfunc.pack import pack, unpack
from gcfunc.partition import partition
from gcfunc.radam import radam
from gcfunc.select import select
from gcfunc.sgd import sgd, sgdw
from gcfunc.train_step import TrainState, train_step

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
    "hooks",
    "layerwise_lr",
    "layerwise_lr_groups",
    "load_state_dict",
    "lookahead",
    "no_decay",
    "no_decay_groups",
    "optim",
    "pack",
    "partition",
    "radam",
    "ranger",
    "select",
    "sgd",
    "sgdw",
    "state_dict",
    "train_step",
    "unpack",
    "update_hyperparams",
]
__version__ = _version("gcfunc")
