"""A model and a batch that processes share, and what one process makes of the whole."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import gcfunc
from gcfunc._centralization.where import Where
from tests.cases import largest_difference
from tests.models import Net

BATCH = 8


def make(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind().double()


def data() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 2, 8, 8, dtype=torch.float64, generator=random)
    return images, torch.randint(3, (BATCH,), generator=random)


def backward(model: nn.Module, images: Tensor, labels: Tensor, share: float = 1.0) -> None:
    (share * F.cross_entropy(model(images), labels)).backward()


def expected(
    kind: type[Net], where: Where = "gc", batch: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """The centralized gradients of one process on the whole batch, in the functional way."""
    model = make(kind)
    backward(model, *(batch or data()))
    grads = gradients(model)
    centralized = gcfunc.centralize(grads, where)
    # Otherwise the comparison would show nothing.
    assert largest_difference(grads, centralized) > 1e-3
    return centralized


def mine(
    batch: tuple[Tensor, Tensor], parts: int = 1, group: dist.ProcessGroup | None = None
) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of a batch, in equal parts."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return [*zip(*(t.chunk(size)[rank].chunk(parts) for t in batch), strict=True)]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that there are, of the model that was wrapped, each one whole."""
    model = getattr(model, "module", model)
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def require_same(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    difference = largest_difference(have, want)
    assert difference <= 1e-12, difference
