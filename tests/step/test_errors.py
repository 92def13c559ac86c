"""Bad states, hyperparameters and checkpoints: a clear error, and nothing changed."""

import inspect
import math
import re
from functools import partial
from typing import Any

import pytest
import torch

import gcfunc
from gcfunc import Optimizer, State
from gcfunc._catalog import CATALOG, Algorithm
from tests.bad_input import (
    OPT,
    PARAMS,
    PLAIN,
    SORTED,
    STATE,
    Case,
    one_else,
    require_refused,
    step,
    unchanged,
)

NO_STATES: list[Any] = [None, {}, tuple(STATE), OPT, STATE.step]
OTHER = "state.hyperparams does not match this optimizer's state"


def slots(**given: Any) -> State:
    """The state with other slots for the bias."""
    new = {s: one_else("fc.bias", given.get(s, c["fc.bias"]), c) for s, c in STATE.slots.items()}
    return STATE._replace(slots=new)


def hyperparam(**given: Any) -> State:
    return STATE._replace(hyperparams=STATE.hyperparams | given)


def checkpoint(**given: Any) -> dict[str, Any]:
    return gcfunc.state_dict(STATE) | given


CASES: dict[str, Case] = {
    # States
    "the state of another optimizer": (
        lambda: step(state=gcfunc.sgd(0.1, 0.9).init(PARAMS)),
        ValueError,
        f"{OTHER}; missing 'beta1', 'beta2', 'eps'; unexpected 'dampening', 'momentum'",
    ),
    "the state of another option": (
        lambda: step(state=gcfunc.adamw(amsgrad=True).init(PARAMS)),
        ValueError,
        "state.slots does not match this optimizer's state; unexpected 'max_exp_avg_sq'",
    ),
    "the state of other params": (
        lambda: step(state=OPT.init({"w": torch.ones(2, 2)})),
        ValueError,
        f"state.slots['exp_avg'] does not match params; missing {SORTED}; unexpected 'w'",
    ),
    "the state of another grouping": (
        lambda: step(
            gcfunc.partition({"a": PLAIN}, lambda name, tensor: "a"), state=PLAIN.init(PARAMS)
        ),
        ValueError,
        f"{OTHER}; missing 'a.lr', 'a.weight_decay'; unexpected 'lr', 'weight_decay'",
    ),
    "a state slot of another shape": (
        lambda: step(state=slots(exp_avg=torch.ones(6))),
        ValueError,
        "state.slots['exp_avg']: 'fc.bias' has shape (6,), but its parameter has (5,)",
    ),
    "a state slot of another dtype": (
        lambda: step(state=slots(exp_avg_sq=torch.ones(5, dtype=torch.float64))),
        ValueError,
        "state.slots['exp_avg_sq']: 'fc.bias' has dtype torch.float64, but its parameter has ",
    ),
    "a state slot on another device": (
        lambda: step(state=slots(exp_avg=torch.ones(5, device="meta"))),
        ValueError,
        "state.slots['exp_avg']: 'fc.bias' has device meta, but its parameter has cpu",
    ),
    "a state slot that is a number": (
        lambda: step(state=slots(exp_avg=0.0)),
        TypeError,
        "state.slots['exp_avg']: 'fc.bias' must be a tensor, got float",
    ),
    "a hyperparameter that is a number": (
        lambda: step(state=hyperparam(lr=0.5)),
        TypeError,
        "state: 'lr' must be a 0-d tensor, got 0.5; gcfunc.update_hyperparams makes one",
    ),
    "a hyperparameter per entry": (
        lambda: step(state=hyperparam(lr=torch.ones(6))),
        TypeError,
        "state: 'lr' must be a 0-d tensor, got tensor([1., 1., 1., 1., 1., 1.])",
    ),
    "a step that is a number": (
        lambda: step(state=State(3, *STATE[1:])),  # type: ignore[arg-type]
        TypeError,
        "state: 'step' must be a 0-d tensor, got 3",
    ),
    **{
        f"a state that is a {type(other).__name__}": (
            partial(step, state=other),
            TypeError,
            f"state must come from init or step, got {type(other).__name__}",
        )
        for other in NO_STATES
    },
    # Hyperparameters; those out of bounds have a table of their own below
    "nesterov without momentum": (
        lambda: gcfunc.sgd(0.1, nesterov=True),
        ValueError,
        "nesterov needs momentum > 0 and dampening = 0, got momentum=0.0 and dampening=0.0",
    ),
    "nesterov with dampening": (
        lambda: gcfunc.sgdw(0.1, 0.9, 0.1, nesterov=True),
        ValueError,
        "nesterov needs momentum > 0 and dampening = 0, got momentum=0.9 and dampening=0.1",
    ),
    "one beta": (
        lambda: gcfunc.adam(betas=0.9),  # type: ignore[arg-type]
        TypeError,
        "betas must be a pair of numbers, got 0.9",
    ),
    "three betas": (
        lambda: gcfunc.ranger(betas=(0.9, 0.9, 0.9)),  # type: ignore[arg-type]
        TypeError,
        "betas must be a pair of numbers, got (0.9, 0.9, 0.9)",
    ),
    "no betas": (
        lambda: gcfunc.radam(betas=None),  # type: ignore[arg-type]
        TypeError,
        "betas must be a pair of numbers, got None",
    ),
    "an unknown hyperparameter": (
        lambda: gcfunc.update_hyperparams(STATE, momentum=0.9),
        ValueError,
        "the state has no hyperparameter 'momentum', it has lr, weight_decay, eps, beta1, beta2",
    ),
    "an unknown group": (
        lambda: gcfunc.update_hyperparams(STATE, **{"head.lr": 0.1}),
        ValueError,
        "the state has no hyperparameter 'head.lr', it has lr, ",
    ),
    "one good and one bad hyperparameter": (
        lambda: gcfunc.update_hyperparams(STATE, lr=0.2, eps=-1.0),
        ValueError,
        "eps must be a finite number >= 0, got -1.0",
    ),
    "hyperparameters of no state": (
        lambda: gcfunc.update_hyperparams(STATE.hyperparams, lr=0.2),  # type: ignore[arg-type]
        TypeError,
        "state must come from init or step, got dict",
    ),
    # Checkpoints; more in test_checkpoint
    "load into no state": (
        lambda: gcfunc.load_state_dict(checkpoint(), checkpoint()),  # type: ignore[arg-type]
        TypeError,
        "state must come from init or step, got dict",
    ),
    "load no mapping": (
        lambda: gcfunc.load_state_dict(STATE, STATE),  # type: ignore[arg-type]
        TypeError,
        "d must map names to tensors, got State",
    ),
    "load a path": (
        lambda: gcfunc.load_state_dict(STATE, "checkpoint.pt"),  # type: ignore[arg-type]
        TypeError,
        "d must map names to tensors, got str",
    ),
    "load swapped arguments": (
        lambda: gcfunc.load_state_dict(checkpoint(), STATE),  # type: ignore[arg-type]
        TypeError,
        "state must come from init or step, got dict",
    ),
    "load what is not all tensors": (
        lambda: gcfunc.load_state_dict(STATE, checkpoint(step=1)),
        ValueError,
        "the checkpoint does not match the state: 'step' is int, expected torch.int64 ()",
    ),
    "a checkpoint with a number for a name": (
        lambda: gcfunc.load_state_dict(
            STATE,
            {**gcfunc.state_dict(STATE), 1: torch.ones(1)},  # type: ignore[dict-item]
        ),
        ValueError,
        "the checkpoint does not match the state; unexpected 1",
    ),
    "the dict of no state": (
        lambda: gcfunc.state_dict(OPT),  # type: ignore[arg-type]
        TypeError,
        "state must come from init or step, got Optimizer",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_changes_nothing(name: str) -> None:
    require_refused(CASES[name])


# Hyperparameters out of bounds

NON_NEGATIVE = "a finite number >= 0"
BOUNDS = {
    "lr": NON_NEGATIVE,
    "momentum": NON_NEGATIVE,
    "dampening": "a finite number",
    "weight_decay": NON_NEGATIVE,
    "eps": NON_NEGATIVE,
    "lr_decay": NON_NEGATIVE,
    "initial_accumulator_value": NON_NEGATIVE,
    "beta1": "in [0, 1)",
    "beta2": "in [0, 1)",
    "k": "an integer from 1 to 2**31",
    "alpha": "in [0, 1]",
}
OUTSIDE: dict[str, list[float]] = {
    NON_NEGATIVE: [-1, -1e-300],
    "a finite number": [],
    "in [0, 1)": [-0.1, 1, 1.0, 1.5],
    "in [0, 1]": [-0.1, 1.5],
    "an integer from 1 to 2**31": [0, -1, 2.5, 0.5],
}
NO_NUMBERS = [True, "0.1", None, 1j, [0.1], (0.1,), torch.nn.Identity]
NO_SCALARS = [torch.ones(2), torch.ones(1), torch.tensor(True), torch.tensor(1j)]


def hyperparameters(row: Algorithm) -> list[str]:
    names: list[str] = []
    for option in inspect.signature(row.constructor).parameters:
        names += ["beta1", "beta2"] if option == "betas" else [option] if option in BOUNDS else []
    return names


HYPERPARAMETERS = [(c, name) for c, row in CATALOG.items() for name in hyperparameters(row)]
IN_STATE = [(c, name) for c, name in HYPERPARAMETERS if name != "initial_accumulator_value"]


def build(constructor: str, **given: Any) -> Optimizer:
    given = {"lr": 0.1} | given
    if "beta1" in given or "beta2" in given:
        given["betas"] = given.pop("beta1", 0.9), given.pop("beta2", 0.99)
    return CATALOG[constructor].make(**given)


def with_a_buffer(constructor: str) -> dict[str, float]:
    return {"momentum": 0.5} if (constructor, "momentum") in HYPERPARAMETERS else {}


def refused(name: str) -> list[tuple[Any, type[Exception], str]]:
    """Bad values of a hyperparameter, the error and its message."""
    outside = [math.nan, math.inf, -math.inf, *OUTSIDE[BOUNDS[name]]]
    tensors = [torch.tensor(x, dtype=torch.float64) for x in outside]
    bounds = f"{name} must be {BOUNDS[name]}, got "
    scalar = f"{name} must be a real 0-d tensor or a number, got a tensor of shape "
    return [
        *((x, ValueError, f"{bounds}{x}") for x in outside),
        *((x, ValueError, f"{bounds}{float(x)}") for x in tensors),
        *(
            (x, TypeError, f"{name} must be a number or a 0-d tensor, got {x!r}")
            for x in NO_NUMBERS
        ),
        *((x, TypeError, f"{scalar}{tuple(x.shape)} and dtype {x.dtype}") for x in NO_SCALARS),
    ]


@pytest.mark.parametrize(("constructor", "name"), HYPERPARAMETERS)
def test_constructors_refuse_hyperparameters(constructor: str, name: str) -> None:
    for value, error, message in refused(name):
        with pytest.raises(error, match="^" + re.escape(message) + "$"):
            build(constructor, **{name: value})
    build(constructor, **{name: 1 if name == "k" else 0.25})


@pytest.mark.parametrize(("constructor", "name"), IN_STATE)
def test_updates_refuse_hyperparameters(constructor: str, name: str) -> None:
    state = build(constructor, **with_a_buffer(constructor)).init(PARAMS)
    still = unchanged(state)
    for value, error, message in refused(name):
        with pytest.raises(error, match="^" + re.escape(message) + "$"):
            gcfunc.update_hyperparams(state, **{name: value})
    assert still()
    new = gcfunc.update_hyperparams(state, **{name: 1 if name == "k" else 0.25})
    assert new.hyperparams[name] == (1 if name == "k" else 0.25)


@pytest.mark.parametrize("constructor", CATALOG)
def test_the_table_of_hyperparameters_is_whole(constructor: str) -> None:
    in_state = {*build(constructor, **with_a_buffer(constructor)).init(PARAMS).hyperparams}
    inner = {"lr", "weight_decay"} if CATALOG[constructor].around else set()
    assert in_state - inner == {name for c, name in IN_STATE if c == constructor}
