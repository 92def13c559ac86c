"""Bad input to a training step: a clear error."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

import gcfunc
from tests.models import TiedMLP
from tests.training.cases import LINEAR, X, Y, vectors

OPT = gcfunc.sgd(0.1)
BAD_ARGUMENTS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no module": (TypeError, "model must be a torch.nn.Module, got function", {"model": F.relu}),
    "nothing to train": (ValueError, "no parameter that requires grad", {"model": nn.ReLU()}),
    "frozen": (
        ValueError,
        "no parameter that requires grad",
        {"model": nn.Linear(3, 2).requires_grad_(False)},
    ),
    "no loss": (TypeError, "loss_fn must be a function", {"loss_fn": "mse"}),
    "loss with parameters": (ValueError, "part of the model", {"loss_fn": nn.Linear(2, 1)}),
    "torch optimizer": (TypeError, "opt must be an optimizer", {"opt": torch.optim.SGD}),
    "compiled optimizer": (TypeError, "not yet compiled", {"opt": gcfunc.compile(OPT)}),
    "no clipping at 0": (ValueError, "clip_norm must be a finite number > 0", {"clip_norm": 0}),
    "negative clipping": (ValueError, "> 0, got -1", {"clip_norm": -1.0}),
    "nan": (ValueError, "> 0, got nan", {"clip_norm": float("nan")}),
    "infinity": (ValueError, "> 0, got inf", {"clip_norm": float("inf")}),
    "clipping on": (TypeError, "clip_norm must be None or a number", {"clip_norm": True}),
    "clip text": (TypeError, "clip_norm must be None or a number", {"clip_norm": "1"}),
    "accumulate 0": (ValueError, "accumulate must be at least 1, got 0", {"accumulate": 0}),
    "accumulate float": (TypeError, "accumulate must be an integer", {"accumulate": 2.0}),
    "accumulate on": (TypeError, "accumulate must be an integer", {"accumulate": True}),
    "autocast on": (TypeError, "autocast must be None, torch.bfloat16", {"autocast": True}),
    "autocast wide": (TypeError, "got torch.float64", {"autocast": torch.float64}),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments(bad: str) -> None:
    error, message, given = BAD_ARGUMENTS[bad]
    arguments: dict[str, Any] = {"model": LINEAR, "loss_fn": F.mse_loss, "opt": OPT} | given
    with pytest.raises(error, match=re.escape(message)):
        gcfunc.train_step(**arguments)


def test_lazy_models_run_once_first() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules", UserWarning)
        model = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="'weight' has no shape yet"):
        gcfunc.train_step(model, F.mse_loss, OPT)


@pytest.mark.usefixtures("process_group")
def test_wrapped_models_are_refused() -> None:
    """What they do in backward would silently not happen."""
    inner = nn.Sequential(nn.Linear(3, 2))
    fully_shard(inner[0])
    for model in (nn.parallel.DistributedDataParallel(nn.Linear(3, 2)), inner):
        with pytest.raises(TypeError, match=r"torch\.func skips what (Distrib|FSDPModule)"):
            gcfunc.train_step(model, F.mse_loss, OPT)


def test_hooks_are_refused() -> None:
    """Gradient centralization by hooks, for one, would silently not happen."""
    model = nn.Linear(3, 2)
    handle = model.bias.register_hook(torch.neg)
    with pytest.raises(ValueError, match="'bias' has a hook"):
        gcfunc.train_step(model, F.mse_loss, OPT)
    handle.remove()
    gcfunc.train_step(model, F.mse_loss, OPT)


def test_a_model_that_was_changed_is_refused() -> None:
    """As by ``to("meta")``, which unties tied weights."""
    model = TiedMLP()
    step = gcfunc.train_step(model, F.mse_loss, OPT)
    train = step.init()
    model.out.weight = nn.Parameter(model.out.weight.detach().clone())
    with pytest.raises(ValueError, match="the model does not match what train_step was given; une"):
        step(train, *vectors(0, torch.float32))


TRAIN = gcfunc.train_step(LINEAR, F.mse_loss, OPT).init()


def mean(out: Tensor, *targets: Any) -> Tensor:
    return out.mean()


BAD_CALLS: dict[str, tuple[type[Exception], str, dict[str, Any], tuple[Any, ...]]] = {
    "loss per sample": (
        ValueError,
        "loss_fn must return a 0-d loss, got shape (4,); take its mean",
        {"loss_fn": lambda out: out.mean(1)},
        (TRAIN, X),
    ),
    "integer loss": (
        TypeError,
        "floating-point loss, got torch.int64",
        {"loss_fn": lambda out: out.argmax()},
        (TRAIN, X),
    ),
    "number": (
        TypeError,
        "must return a tensor, got float",
        {"loss_fn": lambda out: 1.0},
        (TRAIN, X),
    ),
    "nothing": (
        TypeError,
        "must return a tensor, got NoneType",
        {"loss_fn": lambda out: None},
        (TRAIN, X),
    ),
    "aux unannounced": (
        TypeError,
        "must return a tensor, got tuple; for (loss, aux) set has_aux=True",
        {"loss_fn": lambda out: (out.mean(), out)},
        (TRAIN, X),
    ),
    "aux missing": (
        TypeError,
        "with has_aux=True loss_fn must return (loss, aux), got Tensor",
        {"loss_fn": mean, "has_aux": True},
        (TRAIN, X),
    ),
    "aux of numbers": (
        TypeError,
        "aux must be a pytree of tensors, got a float in it",
        {"loss_fn": lambda out: (out.mean(), {"accuracy": 0.5}), "has_aux": True},
        (TRAIN, X),
    ),
    "batch not divisible": (
        ValueError,
        "accumulate=3 does not divide 'inputs' with dimension 0 of size 4",
        {"loss_fn": mean, "accumulate": 3},
        (TRAIN, X),
    ),
    "target not divisible": (
        ValueError,
        "accumulate=2 does not divide 'targets.0.weights' with dimension 0 of size 3",
        {"loss_fn": mean, "accumulate": 2},
        (TRAIN, X, {"weights": torch.ones(3)}),
    ),
    "empty batch": (
        ValueError,
        "does not divide 'inputs' with dimension 0 of size 0",
        {"loss_fn": mean, "accumulate": 2},
        (TRAIN, X[:0]),
    ),
    "0-d": (
        ValueError,
        "accumulate=2 cannot cut up 'targets.1', a 0-d tensor",
        {"loss_fn": mean, "accumulate": 2},
        (TRAIN, X, Y, torch.tensor(0.5)),
    ),
    "unknown container": (
        TypeError,
        "accumulate=2 cannot cut up 'inputs' of type object",
        {"loss_fn": mean, "accumulate": 2},
        (TRAIN, object()),
    ),
    "params for train": (
        TypeError,
        "train must come from init or step, got dict",
        {"loss_fn": mean},
        (TRAIN.params, X),
    ),
    "another model's params": (
        ValueError,
        "train.params does not match the model's trained ones; missing 'bias'",
        {"loss_fn": mean},
        (TRAIN._replace(params={"weight": X}), X),
    ),
    "another model's buffers": (
        ValueError,
        "train.buffers does not match the model's; unexpected 'mean'",
        {"loss_fn": mean},
        (TRAIN._replace(buffers={"mean": X}), X),
    ),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls(bad: str) -> None:
    error, message, options, arguments = BAD_CALLS[bad]
    step = gcfunc.train_step(LINEAR, opt=OPT, **options)
    with pytest.raises(error, match=re.escape(message)):
        step(*arguments)


def test_what_the_optimizer_refuses() -> None:
    """Its own errors, from ``init`` and from ``step``."""
    bias = nn.Linear(3, 2)
    bias.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="selects none of 1 tensors"):
        gcfunc.train_step(bias, F.mse_loss, gcfunc.sgd(0.1, gc="gc")).init()
    step = gcfunc.train_step(LINEAR, F.mse_loss, gcfunc.sgd(0.1, 0.9))
    with pytest.raises(ValueError, match=r"state.hyperparams does not match"):
        step(TRAIN, X, Y)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused(when: str, kind: str) -> None:
    model = nn.Linear(2, 2)
    if when == "before":
        getattr(model.weight, kind)(lambda g: None)
        with pytest.raises(ValueError, match="'weight' has a hook"):
            gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(0.1))
        return
    step = gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(0.1))
    getattr(model.weight, kind)(lambda g: None)
    with pytest.raises(ValueError, match="'weight' has a hook"):
        step(step.init(), torch.ones(1, 2), torch.ones(1, 2))


def test_hooks_on_modules_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    with pytest.raises(ValueError, match="has a backward hook"):
        gcfunc.train_step(model, nn.functional.mse_loss, gcfunc.sgd(0.1))


@pytest.mark.usefixtures("process_group")
def test_dtensors_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Linear(4, 6)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="'weight' is a DTensor"):
        gcfunc.train_step(model, F.mse_loss, gcfunc.sgd(0.1))
