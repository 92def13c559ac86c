"""What the tests of hook mode share: models, a batch, and what must come out."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gcfunc
from gcfunc._centralization.where import Where
from gcfunc.hooks import centralize_backward
from tests.distributed import gradients, require_same

F64 = torch.float64
X = torch.randn(3, 5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
BOTH = ("0.weight", "2.weight")
"""The weights of ``mlp()``."""

Run = Callable[[nn.Module], Any]


def random(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    """With a mean that GC has something to subtract."""
    return (0.5 + torch.randn(shape, dtype=F64)).to(dtype)


def mlp(dtype: torch.dtype = F64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def loss_of(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Each output counts differently, so that gradients of no two units are alike."""
    out = model(*inputs)
    out = out if isinstance(out, Tensor) else out[0]
    weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (out * weights).square().mean()


def hooks_on(model: nn.Module) -> list[Any]:
    """Every hook that parameters or DDP have."""
    found = [*getattr(model, "_comm_hooks", [])]
    for p in model.parameters():
        found += (p._backward_hooks or {}).values()
        found += (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
    return found


def require_centralized(model: nn.Module, run: Run, where: Where = "gc") -> None:
    """What ``run`` leaves in ``.grad``, of the hooked model and of a plain copy."""
    plain = copy.deepcopy(model)
    run(plain)
    with centralize_backward(model, where) as handle:
        run(model)
        handle.check(model)
    have, without = gradients(model), gradients(plain)
    present = [name for name in handle.names if name in without]
    whole = dict(plain.named_parameters()) | without  # a mask has to match them all
    want = gcfunc.centralize(whole, where)
    require_same(have, {name: want[name] for name in without})
    require_different(without, have, present)


def require_different(
    without: Mapping[str, Tensor], have: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """GC made a difference to these, and to no others."""
    assert names
    changed = [n for n, g in without.items() if float((g - have[n]).abs().max()) > 1e-5]
    assert changed == [*names]


SPARSE: dict[str, Callable[[bool], nn.Module]] = {
    "Embedding": lambda sparse: nn.Embedding(7, 4, sparse=sparse),
    "padded": lambda sparse: nn.Embedding(7, 4, padding_idx=3, sparse=sparse),
    "EmbeddingBag, sum": lambda sparse: nn.EmbeddingBag(7, 4, mode="sum", sparse=sparse),
    "EmbeddingBag, mean": lambda sparse: nn.EmbeddingBag(7, 4, mode="mean", sparse=sparse),
}


def of_one_process() -> DeviceMesh:
    return init_device_mesh("cpu", (1,))
