"""Generated kernels, interpreted. `test_interpreted.py` runs this in a process of its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cuda.generated import Generated, generate
from benchmarks.cuda.interpret import run
from tests.cuda.functions import (
    COMBO,
    PERSISTENT,
    SHAPES,
    copied_together,
    device,
    each,
    empty,
    generate_step,
    lists,
)

CLOSE = 1e-6


def error(found: Generated, fakes: list[Tensor], function: Callable[..., object] = each) -> float:
    """The largest difference of the interpreted step from the eager one in float64."""
    torch.manual_seed(0)
    ours = [torch.randn(fake.shape) for fake in fakes]
    exact = [t.double() for t in ours]
    run(found, zip(fakes, ours, strict=True))
    n = len(fakes) // 3
    function(exact[:n], exact[n : 2 * n], exact[2 * n :])
    pairs = zip(ours, exact, strict=True)
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()


@pytest.mark.parametrize(
    ("function", "options"),
    [(each, {}), (each, COMBO), (lists, {})],
    ids=["each", "combo", "lists"],
)
def test_values_are_those_of_the_eager_step(
    function: Callable[..., Any], options: dict[str, Any]
) -> None:
    found, fakes = generate_step(function, SHAPES, options=options)
    assert error(found, fakes) < CLOSE


def test_a_broken_kernel_is_seen() -> None:
    found, fakes = generate_step(each, [PERSISTENT])
    ((name, source),) = found.kernels.items()
    assert source.count("576.0") == 1  # the mean is taken over so many
    broken = replace(found, kernels={name: source.replace("576.0", "575.0")})
    assert error(found, fakes) < CLOSE
    assert error(broken, fakes) > 100 * CLOSE


def test_memory_that_nothing_was_written_to_is_seen() -> None:
    with device():
        x = empty(10)
        found = generate(lambda x: x + 1, x)
    ((name, source),) = found.kernels.items()
    ours = torch.zeros(10)
    (written,) = run(found, [(x, ours)])
    assert torch.equal(written, torch.ones(10))
    half = replace(found, kernels={name: source.replace("xnumel = 10", "xnumel = 5")})
    (written,) = run(half, [(x, ours)])
    assert written.isnan().sum() == 5


@torch.library.custom_op("tests_cuda::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.mul_(2)


def test_operators_run_for_real() -> None:
    def function(x: Tensor) -> Tensor:
        y = x + 1
        double_(x)
        return y * x

    with device():
        x = empty(10)
        found = generate(function, x)
    (extern,) = found.externs
    assert extern.name == "torch.ops.tests_cuda.double_.default"
    ours = torch.full((10,), 3.0)
    (result,) = run(found, [(x, ours)])
    assert torch.equal(ours, torch.full((10,), 6.0))
    assert torch.equal(result, torch.full((10,), 24.0))


def test_each_tensor_of_the_graph_needs_its_numbers() -> None:
    with device():
        x, y = empty(10), empty(10)
        found = generate(lambda x, y: x + y, x, y)
    with pytest.raises(ValueError, match="no tensors stand for"):
        run(found, [(x, torch.zeros(10))])


def test_inductor_still_mixes_up_lists_that_are_copied_together() -> None:
    """Slots are made anew of parameters that were just written.

    That is so in foreach kernels alone, which it writes for GPUs.
    """
    found, fakes = generate_step(copied_together, [PERSISTENT])
    assert error(found, fakes, copied_together) > 100 * CLOSE
