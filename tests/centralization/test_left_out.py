"""What select leaves out is named, with the reason."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gcfunc
from gcfunc import GC, Units
from gcfunc._centralization.where import RULES
from gcfunc.hooks import centralize_backward
from tests.centralization.layers import COLUMNS, differ, tied

ONE_INPUT = "with one input per output unit its gradient would always be zero"


def unknown(kind: str) -> str:
    return f"{kind} is no layer whose output units are known"


def no_weight(name: str, kind: str) -> str:
    return f'{name!r} of {kind} is not called "weight"'


class Own(nn.Module):
    """Someone's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.token = nn.Parameter(torch.ones(1, 1, 3))


class LowRank(nn.Linear):
    """A Linear layer that adapts by two more weights."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.lora_A = nn.Parameter(torch.ones(2, 4))


MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "nothing": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)), {}),
    "embeddings": (
        lambda: nn.ModuleList([nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)]),
        {"0.weight": unknown("Embedding"), "1.weight": unknown("EmbeddingBag")},
    ),
    "a norm of two dimensions": (
        lambda: nn.LayerNorm([3, 4], bias=False),
        {"weight": unknown("LayerNorm")},
    ),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        {f"bias_{x}": no_weight(f"bias_{x}", "MultiheadAttention") for x in "kv"},
    ),
    "recurrence": (lambda: nn.GRU(1, 4), {"weight_ih_l0": ONE_INPUT}),
    "someone's own": (Own, {"weight": unknown("Own"), "token": unknown("Own")}),
    "someone's own parameter": (
        LowRank,
        {"lora_A": no_weight("lora_A", "LowRank")},
    ),
    "parameters of no layer": (
        lambda: nn.ParameterList([torch.ones(2, 3), torch.ones(2)]),
        {"0": unknown("ParameterList")},
    ),
    "a tied head": (
        lambda: tied(nn.Embedding(5, 4), nn.Linear(4, 5)),
        {"0.weight": f"tied, and {unknown('Embedding')}"},
    ),
    "tied tables": (
        lambda: tied(nn.Embedding(5, 4), nn.Embedding(5, 4)),
        {"0.weight": unknown("Embedding")},
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        {"parametrizations.weight.original0": no_weight("original0", "ParametrizedLinear")},
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_left_out(name: str) -> None:
    build, expected = MODULES[name]
    model = build()
    assert gcfunc.left_out(model) == expected


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("where", RULES)
def test_what_is_not_left_out_is_selected(name: str, where: str) -> None:
    model = MODULES[name][0]()
    mask, out = gcfunc.select(model, where), gcfunc.left_out(model, where)
    weights = [n for n, p in model.named_parameters() if p.ndim >= 2]
    assert [n for n in weights if not mask[n]] == [*out]


def test_what_a_rule_leaves_out() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 2), nn.LSTM(2, 3))
    assert gcfunc.left_out(model) == {}
    assert gcfunc.left_out(model, "linear") == {"0.weight": "Conv1d is left out by where='linear'"}
    assert gcfunc.left_out(model, "gcc") == {
        "1.weight": "Linear is left out by where='gcc'",
        "2.weight_ih_l0": "LSTM is left out by where='gcc'",
        "2.weight_hh_l0": "LSTM is left out by where='gcc'",
    }


def test_what_further_layers_add() -> None:
    assert gcfunc.left_out(Own(), layers={Own: Units()}) == {"token": no_weight("token", "Own")}
    assert gcfunc.left_out(tied(nn.Linear(4, 3), Own()), layers={Own: COLUMNS}) == {
        "0.weight": "tied, and its layers lay it out in two ways",
        "1.token": no_weight("token", "Own"),
    }


def test_a_parameter_is_added_by_hand() -> None:
    """As the docstring of left_out says."""
    model = LowRank()
    grads = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    centralized = gcfunc.centralize(grads, where=gcfunc.select(model) | {"lora_A": True})
    assert differ(centralized["lora_A"], grads["lora_A"])
    assert not differ(centralized["lora_A"].mean(1), torch.zeros(2))


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_rows_of_recurrent_weights_are_output_units(kind: type[nn.Module]) -> None:
    """Each row is used by one unit of what a cell puts out, as a gate of it."""
    torch.manual_seed(0)
    cell, hidden = kind(3, 4).double(), torch.rand(2, 4, dtype=torch.float64)
    state = (hidden, hidden) if kind is nn.LSTMCell else hidden
    out = cell(torch.rand(2, 3, dtype=torch.float64), state)
    units = (out[0] if kind is nn.LSTMCell else out).sum(0)
    for name in ("weight_ih", "weight_hh"):
        weight = cell.get_parameter(name)
        used = [torch.autograd.grad(u, weight, retain_graph=True)[0].ne(0).any(1) for u in units]
        assert torch.stack(used).sum(0).tolist() == [1] * len(weight)
        assert gcfunc.select(cell)[name] is True


def test_a_recurrent_model_is_trained_with_gc() -> None:
    """By hooks, and by a step, and by rows."""
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, num_layers=2, proj_size=2).double()
    mask = gcfunc.select(model)
    x = torch.rand(5, 2, 3, dtype=torch.float64)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x)[0].pow(3).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with centralize_backward(model, where=mask):
        hooked = gradients()
    params = {n: p.detach() for n, p in model.named_parameters()}
    opt = gcfunc.sgd(1.0, gc=GC(where=mask))
    new, _ = opt.step(params, plain, opt.init(params))
    for n, g in plain.items():
        by_rows = g - g.mean(1, keepdim=True) if "weight" in n else g
        torch.testing.assert_close(hooked[n], by_rows, rtol=0, atol=1e-12)
        torch.testing.assert_close(new[n], params[n] - by_rows, rtol=0, atol=1e-12)
        assert differ(g, by_rows) == ("weight" in n)
