"""What is given wrongly, and what every refusal of it has in common."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gcfunc
from gcfunc import Optimizer

PARAMS = {
    "conv.weight": torch.arange(48.0).view(4, 3, 2, 2),
    "fc.weight": torch.arange(30.0).view(5, 6),
    "fc.bias": torch.arange(5.0),
}
GRADS = {name: p.cos() for name, p in PARAMS.items()}
OPT = gcfunc.adamw(0.1, gc="gc")
_, STATE = OPT.step(PARAMS, GRADS, OPT.init(PARAMS))
PLAIN = gcfunc.sgd(0.1)
MODEL = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
LEAVES = "'conv.weight', 'fc.weight', 'fc.bias'"
SORTED = "'conv.weight', 'fc.bias', 'fc.weight'"
FLOATS = "supported are float32, bfloat16, float16, float64"

Case = tuple[Callable[[], object], type[Exception], str]
"""What is called, the error, and the whole message or its beginning."""


def unchanged(trees: Any) -> Callable[[], bool]:
    """Whether the tensors in there still are what they are now."""
    tensors = [t for t in pytree.tree_leaves(trees) if isinstance(t, Tensor)]
    versions = [t._version for t in tensors]
    plain = [t for t in tensors if t.layout is torch.strided and not t.is_meta and not t.is_nested]
    values = [t.clone() for t in plain]
    return lambda: (
        [t._version for t in tensors] == versions and all(map(torch.equal, plain, values))
    )


def one_else(name: str, other: Any, of: Mapping[str, Tensor] = GRADS) -> dict[str, Any]:
    """The same tree with another leaf; the last one, so that the others come first."""
    assert name in of
    return {n: t for n, t in of.items() if n != name} | {name: other}


def step(opt: Optimizer = OPT, **given: Any) -> object:
    args = {"params": PARAMS, "grads": GRADS, "state": STATE} | given
    still = unchanged(args)
    try:
        return opt.step(**args)
    finally:
        assert still()


def require_refused(case: Case) -> None:
    """A clear error; nothing changed, and the next step works."""
    call, error, message = case
    still = unchanged([PARAMS, GRADS, STATE, dict(MODEL.named_parameters())])
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
    assert still()
    step()
