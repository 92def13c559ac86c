"""What the paper means by weights, asked of every kind of layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import gcfunc
from gcfunc import Units
from gcfunc._centralization.where import RULES
from tests.centralization.layers import COLUMNS, require_by_output_unit, tied

LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], bool | Units]] = {
    "linear": (lambda: nn.Linear(4, 3), [(2, 4)], True),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], True),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3), [(2, 4, 5)], True),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3), [(2, 4, 5, 5)], True),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), [(2, 2, 3, 3, 3)], True),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), [(2, 4, 5, 5)], True),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), [(2, 4, 5, 5)], True),
    "pointwise": (lambda: nn.Conv2d(4, 3, 1), [(2, 4, 5, 5)], True),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 3, 3), [(2, 4, 5)], COLUMNS),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), [(2, 4, 5, 5)], COLUMNS),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), [(2, 2, 3, 3, 3)], COLUMNS),
    "transposed-grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        [(2, 4, 5, 5)],
        Units(dim=1, groups=2),
    ),
    "transposed-depthwise": (
        lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
        [(2, 4, 5)],
        Units(dim=1, groups=4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_by_output_unit(name: str) -> None:
    require_by_output_unit(*LAYERS[name])


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized(layer: nn.Module, *by: nn.Module) -> nn.Module:
    for module in by:
        parametrize.register_parametrization(layer, "weight", module)
    return layer


def weighing(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight)
    return layer


class Projection(nn.Module):
    """Someone's own layer, its weight stored by inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.table = nn.Parameter(torch.ones(4, 3))


ORIGINAL = "parametrizations.weight.original"
NOTHING: dict[str, Any] = {}
# What of a model is selected; all else is not.
MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "attention": (
        lambda: nn.MultiheadAttention(8, 2),
        {"in_proj_weight": True, "out_proj.weight": True},
    ),
    "attention, keys and values of other widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True),
        {f"{x}_proj_weight": True for x in "qkv"} | {"out_proj.weight": True},
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {"self_attn.in_proj_weight": True, "self_attn.out_proj.weight": True}
        | {"linear1.weight": True, "linear2.weight": True},
    ),
    "tables and norms": (
        lambda: nn.ModuleList(
            [
                nn.Embedding(5, 4),
                nn.EmbeddingBag(5, 4),
                nn.LayerNorm([3, 4]),
                nn.BatchNorm2d(3),
                nn.GroupNorm(1, 3),
                nn.PReLU(3),
            ]
        ),
        NOTHING,
    ),
    **{
        kind.__name__: (
            partial(kind, 3, 4, num_layers=2),
            {f"weight_{x}_l{i}": True for i in range(2) for x in ("ih", "hh")},
        )
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
    },
    "LSTM, both ways and projected": (
        lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True),
        {f"weight_{x}_l0{way}": True for way in ("", "_reverse") for x in ("ih", "hh", "hr")},
    ),
    "LSTM of one input": (lambda: nn.LSTM(1, 4), {"weight_hh_l0": True}),
    **{
        kind.__name__: (partial(kind, 3, 4), {"weight_ih": True, "weight_hh": True})
        for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    },
    "LSTM with weight norm": (
        lambda: parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        {"weight_ih_l0": True, "parametrizations.weight_hh_l0.original1": True},
    ),
    "one input": (lambda: nn.Linear(1, 3), NOTHING),
    "one input, depthwise": (lambda: nn.Conv2d(4, 4, 1, groups=4), NOTHING),
    "one input, transposed": (lambda: nn.ConvTranspose2d(2, 6, 1, groups=2), NOTHING),
    "two inputs, transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 1, groups=2),
        {"weight": Units(dim=1, groups=2)},
    ),
    "no inputs": (lambda: weighing(nn.Linear(4, 3), torch.empty(3, 0)), NOTHING),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), {ORIGINAL: True}),
    "spectral norm, transposed": (
        lambda: parametrizations.spectral_norm(nn.ConvTranspose1d(4, 6, 3, groups=2)),
        {ORIGINAL: Units(dim=1, groups=2)},
    ),
    "spectral norm of a table": (
        lambda: parametrizations.spectral_norm(nn.Embedding(4, 3)),
        NOTHING,
    ),
    # Of its two parameters the direction, which has the weight's shape; lengths have one input.
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        {"parametrizations.weight.original1": True},
    ),
    "two parametrizations": (
        lambda: parametrized(nn.Linear(4, 3), Halved(), Halved()),
        {ORIGINAL: True},
    ),
    "head tied to its embedding": (lambda: tied(nn.Embedding(5, 4), nn.Linear(4, 5)), NOTHING),
    "embedding tied to its head": (lambda: tied(nn.Linear(4, 5), nn.Embedding(5, 4)), NOTHING),
    "tied twins": (lambda: tied(nn.Linear(4, 4), nn.Linear(4, 4)), {"0.weight": True}),
    "someone's own": (Projection, NOTHING),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    build, expected = MODULES[name]
    model = build()
    mask = gcfunc.select(model)
    assert [*mask] == [n for n, _ in model.named_parameters()]
    assert {n: answer for n, answer in mask.items() if answer is not False} == expected
    if expected:
        grads = {n: torch.rand_like(p) for n, p in model.named_parameters()}
        centralized = gcfunc.centralize(grads, where=mask)
        for n in grads:
            assert torch.equal(centralized[n], grads[n]) == (n not in expected), n


@pytest.mark.parametrize("where", RULES)
def test_further_layers(where: str) -> None:
    class Table(nn.Embedding):
        pass

    model = nn.ModuleDict(
        {
            "own": Projection(),
            "table": Table(5, 4),
            "bag": nn.EmbeddingBag(3, 4),
            "narrow": Table(5, 1),
            "linear": nn.Linear(4, 3),
        }
    )
    plain = {n: answer for n, answer in gcfunc.select(model, where).items() if answer}
    assert plain == ({"linear.weight": True} if "linear" in RULES[where].layers else {})
    mask = gcfunc.select(
        model,
        where,
        layers={
            Projection: COLUMNS,
            nn.Embedding: Units(),
            nn.EmbeddingBag: Units(),
            nn.Linear: COLUMNS,
        },
    )
    assert {n: answer for n, answer in mask.items() if answer} == {
        "own.weight": COLUMNS,
        "table.weight": True,
        "bag.weight": True,
        "linear.weight": COLUMNS,
    }


def test_frozen_and_shared_modules_are_listed_once() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    model = nn.ModuleList([layer, layer])
    assert gcfunc.select(model) == {"0.weight": True, "0.bias": False}
