"""``gc=None`` is torch.optim, option by option."""

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gcfunc._catalog import CATALOG
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


PAIRS = {name: row for name, row in CATALOG.items() if row.twin}

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
    opt = PAIRS[name].make(lr=LR, **options(name, choice))
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
    theirs = PAIRS[name].twin
    assert theirs is not None
    opt = theirs(params.values(), lr=LR, **options(name, choice))
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
