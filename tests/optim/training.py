"""What the tests of the drop-ins share: parameters, and training with given gradients."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gcfunc._catalog import CATALOG, Algorithm
from tests.cases import Params, make_params, random_like

EXACT = 1e-12
Options = dict[str, Any]
New = Callable[..., Optimizer]
"""A class and its options: ``new(params) -> optimizer``."""


def kind_of(algorithm: Algorithm, variant: str) -> str:
    return ", ".join(filter(None, (algorithm.drop_in.__name__, variant)))


# Every option that torch's classes have, on somewhere.
PLAIN: dict[str, tuple[str, Options]] = {
    **{
        kind_of(row, variant): (
            row.drop_in.__name__,
            {**options, "maximize": True} if variant else {**options},
        )
        for row in CATALOG.values()
        if row.twin
        for variant, options in row.variants.items()
    },
    "Adam, decoupled": (
        "Adam",
        {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "AdamW, amsgrad": ("AdamW", {"lr": 0.1, "betas": (0.5, 0.8), "amsgrad": True}),
}


def leaves(dtype: torch.dtype = torch.float64) -> Params:
    """Parameters of each common kind, ready to be trained."""
    return {name: p.requires_grad_() for name, p in make_params(dtype).items()}


def copies(params: Mapping[str, Tensor]) -> Params:
    return {name: p.detach().clone().requires_grad_() for name, p in params.items()}


def set_grads(params: Params, seed: int, only: Iterable[str] | None = None) -> None:
    """Random gradients for some of the parameters, and none for the others."""
    grads = random_like(params, seed)
    for name, p in params.items():
        wanted = only is None or name in only
        # Laid out like its parameter, as autograd's are.
        p.grad = torch.empty_like(p.detach()).copy_(grads[name]) if wanted else None


def train(
    opt: Optimizer, params: Params, steps: Iterable[int], only: Iterable[str] | None = None
) -> Optimizer:
    """Steps with the gradients of their numbers."""
    for seed in steps:
        set_grads(params, seed, only)
        opt.step()
    return opt


def values(opt: Optimizer) -> list[Tensor]:
    """The parameters of all groups as they are now."""
    return [p.detach().clone() for group in opt.param_groups for p in group["params"]]


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    assert len(a) == len(b)
    pairs = [(x.detach().double(), y.detach().double()) for x, y in zip(a, b, strict=True)]
    each = [(x - y).abs().max() for x, y in pairs if x.numel()]
    return float(torch.stack(each).max()) if each else 0.0


def require_same_state(a: Mapping[str, Any], b: Mapping[str, Any], within: float = EXACT) -> None:
    """Whether two saved dicts agree, in the order of their keys too, but for our ``gc``."""
    keys = [
        (
            [(i, list(entry)) for i, entry in saved["state"].items()],
            [sorted({*group} - {"gc"}) for group in saved["param_groups"]],
        )
        for saved in (a, b)
    ]
    assert keys[0] == keys[1]
    for ours, theirs in zip(a["param_groups"], b["param_groups"], strict=True):
        for option, value in ours.items():
            assert option == "gc" or value == theirs[option], option
    for i, entry in a["state"].items():
        for name, t in entry.items():
            other = b["state"][i][name]
            assert (t.shape, t.dtype, t.stride()) == (other.shape, other.dtype, other.stride())
            assert difference([t], [other]) <= within, name


def saved(opt: Optimizer) -> dict[str, Any]:
    """The optimizer's state as it is now."""
    return copy.deepcopy(opt.state_dict())
