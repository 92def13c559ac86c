"""``gc=None`` is torch.optim, option by option."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gcfunc
from gcfunc import Optimizer
from tests.cases import Params

STEPS = 50
EXACT = 1e-12
LR = 0.1

# torch.testing.assert_close's defaults: rtol and atol.
TOLERANCES = {
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
}
DTYPES = [torch.float64, *TOLERANCES]


class Pair(NamedTuple):
    """One algorithm in both libraries, and two values for each of its options."""

    ours: Callable[..., Optimizer]
    theirs: Callable[..., torch.optim.Optimizer]
    options: dict[str, tuple[Any, Any]]


DECAY = {"weight_decay": (0.0, 1.0)}
BETAS = {"betas": ((0.9, 0.999), (0.5, 0.8))}
ADAM = {**BETAS, "eps": (1e-8, 0.1), **DECAY, "amsgrad": (False, True)}
PAIRS = {
    "sgd": Pair(
        gcfunc.sgd,
        torch.optim.SGD,
        {"momentum": (0.0, 0.9), "dampening": (0.0, 0.3), **DECAY, "nesterov": (False, True)},
    ),
    "adam": Pair(gcfunc.adam, torch.optim.Adam, ADAM),
    "adamw": Pair(gcfunc.adamw, torch.optim.AdamW, ADAM),
    "adagrad": Pair(
        gcfunc.adagrad,
        torch.optim.Adagrad,
        {
            "lr_decay": (0.0, 0.5),
            **DECAY,
            "initial_accumulator_value": (0.0, 1.0),
            "eps": (1e-10, 0.1),
        },
    ),
    "radam": Pair(
        gcfunc.radam,
        torch.optim.RAdam,
        {**BETAS, "eps": (1e-8, 1.0), **DECAY, "decoupled_weight_decay": (False, True)},
    ),
}

Choice = tuple[int, ...]
"""Which of its two values each option has."""


def options(name: str, choice: Choice) -> dict[str, Any]:
    table = PAIRS[name].options
    return {option: table[option][i] for option, i in zip(table, choice, strict=True)}


def choices(name: str) -> Iterator[Choice]:
    for choice in product((0, 1), repeat=len(PAIRS[name].options)):
        o = options(name, choice)
        if not o.get("nesterov") or (o["momentum"] and not o["dampening"]):
            yield choice


@cache
def data(dtype: torch.dtype) -> tuple[Params, list[Params]]:
    """Starts and gradients in which every option shows, and 16 bits suffice.

    Gradients fall after two steps, for amsgrad to remember the first. They keep their sign and
    params start close to zero on its far side, so that params are no larger than their
    displacement and the rounding of one is that of the other.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(low: float, high: float) -> Params:
        shapes = {"conv": (4, 3, 2), "linear": (5, 6), "bias": (7,), "gain": ()}
        return {
            name: torch.empty(shape, dtype=torch.float64)
            .uniform_(low, high, generator=generator)
            .to(dtype)
            for name, shape in shapes.items()
        }

    return draw(0.006, 0.036), [draw(0.5, 1.5) if t < 2 else draw(0.1, 0.3) for t in range(STEPS)]


def flat(params: Params) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in params.values()])


@cache
def ours(name: str, choice: Choice, dtype: torch.dtype) -> Tensor:
    params, grads = data(dtype)
    opt = PAIRS[name].ours(LR, **options(name, choice))
    state = opt.init(params)
    rows = [flat(params)]
    for g in grads:
        params, state = opt.step(params, g, state)
        rows.append(flat(params))
    return torch.stack(rows)


@cache
def theirs(name: str, choice: Choice, dtype: torch.dtype) -> Tensor:
    start, grads = data(dtype)
    params = {n: p.clone().requires_grad_() for n, p in start.items()}
    opt = PAIRS[name].theirs(params.values(), LR, **options(name, choice))
    rows = [flat(params)]
    for g in grads:
        for n, p in params.items():
            p.grad = g[n].clone()
        opt.step()
        rows.append(flat(params))
    return torch.stack(rows)


def excess(name: str, dtype: torch.dtype, our_choice: Choice, their_choice: Choice) -> float:
    """The largest difference over all entries and steps, 1 being what is tolerated."""
    a, b = ours(name, our_choice, dtype), theirs(name, their_choice, dtype)
    error = (a - b)[1:].abs()
    if dtype is torch.float64:
        return float(error.max()) / EXACT
    # Params are a sum of updates, and each adds its own rounding: gcfunc's once, of a float32
    # result, torch's after every operation (hence one update's worth more, for the first to have).
    rtol, atol = TOLERANCES[dtype]
    displacement = (b - b[0])[1:].abs().cummax(0).values
    updates = torch.arange(1, STEPS + 1)[:, None]
    return float((error / ((updates + 1) * (atol + rtol * displacement))).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "choice"),
    [(name, choice) for name in PAIRS for choice in choices(name)],
    ids=lambda value: value if isinstance(value, str) else "".join(map(str, value)),
)
def test_equals_torch(name: str, choice: Choice, dtype: torch.dtype) -> None:
    assert excess(name, dtype, choice, choice) <= 1, options(name, choice)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in PAIRS for option in PAIRS[name].options]
)
def test_another_option_would_not_pass(name: str, option: str, dtype: torch.dtype) -> None:
    i = list(PAIRS[name].options).index(option)
    valid = set(choices(name))
    flipped = {choice: (*choice[:i], 1 - choice[i], *choice[i + 1 :]) for choice in valid}
    assert max(excess(name, dtype, a, b) for a, b in flipped.items() if b in valid) > 1
