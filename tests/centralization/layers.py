"""What layers are asked: how their outputs depend on their weights."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import gcfunc
from gcfunc import Units

COLUMNS = Units(dim=1)


def differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-6


def tied(first: nn.Module, second: nn.Module) -> nn.Module:
    second.weight = first.weight
    return nn.ModuleList([first, second])


def output_units(layer: nn.Module, inputs: list[Tensor]) -> Iterator[Tensor]:
    """Which weights each output channel depends on, found by differentiating it."""
    outputs = layer(*inputs)
    # Channels come last but in convolutions, whose outputs have dimensions of space besides.
    channels = outputs.unbind(-1 if outputs.ndim == 2 else 1)
    for channel in channels:
        (g,) = torch.autograd.grad(
            channel.sum(), [layer.get_parameter("weight")], retain_graph=True
        )
        yield g != 0


def require_by_output_unit(
    build: Callable[[], nn.Module], shapes: list[tuple[int, ...]], answer: bool | Units
) -> None:
    """Whether a layer's weight is selected, and centralized by what each output depends on."""
    torch.manual_seed(0)
    layer = build().double()
    inputs = [1 + torch.rand(shape, dtype=torch.float64) for shape in shapes]
    assert gcfunc.select(layer) == {"weight": answer, "bias": False}
    layer(*inputs).pow(3).sum().backward()
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    expected = grads["weight"].clone()
    uses = torch.zeros_like(expected)
    for unit in output_units(layer, inputs):
        expected[unit] -= expected[unit].mean()
        uses += unit
    assert (uses == 1).all()
    centralized = gcfunc.centralize(grads, where=gcfunc.select(layer))
    torch.testing.assert_close(centralized["weight"], expected, rtol=0, atol=1e-9)
    assert centralized["bias"] is grads["bias"]
    assert differ(centralized["weight"], grads["weight"])
    by_dimensions = gcfunc.centralize(grads)["weight"]
    # A group of one input has rows for units, transposed or not.
    rows = answer is True or answer == Units(dim=1, groups=len(expected))
    assert differ(centralized["weight"], by_dimensions) == (not rows)
