"""Hook mode under DDP, FSDP2 and tensor parallel equals one process on the whole batch, by value.

Row means alone would be zero after centralizing the wrong thing too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gcfunc
from gcfunc.hooks import centralize_backward, register_ddp
from tests.cases import largest_difference
from tests.processes import Processes

BATCH = 8


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    with Processes(4) as processes:
        yield processes


class Net(nn.Module):
    """Convolutions, channels_last among them, linear layers, and a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.conv2 = nn.Conv2d(5, 3, 3)
        self.positions = nn.Parameter(torch.randn(1, 48))
        self.fc = nn.Linear(48, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv(x)))).flatten(1)
        return self.out(torch.tanh(self.fc(x + self.positions)))


class Tied(Net):
    """The last layer is used twice, and its weight a third time."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.out(F.linear(x, self.out.weight.t()))


class WithUnused(Net):
    """Two parameters get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)


class Checkpointed(Net):
    """The first half is computed again in the backward pass."""

    reentrant: bool

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()  # the reentrant kind wants an input that requires grad
        x = checkpoint(
            lambda x: F.relu(self.conv2(F.relu(self.conv(x)))).flatten(1),
            x,
            use_reentrant=self.reentrant,
        )
        return self.out(torch.tanh(self.fc(x + self.positions)))


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class CheckpointedOtherwise(Checkpointed):
    reentrant = False


def make(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    model = kind().double()
    model.conv2.weight.data = model.conv2.weight.data.contiguous(memory_format=torch.channels_last)
    return model


def data() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 2, 8, 8, dtype=torch.float64, generator=random)
    return images, torch.randint(3, (BATCH,), generator=random)


def backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(images), labels).backward()


def expected(kind: type[Net], where: str = "gc") -> dict[str, Tensor]:
    """The centralized gradients of one process on the whole batch, in the functional way."""
    model = make(kind)
    backward(model, *data())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    centralized = gcfunc.centralize(grads, where)
    # Otherwise the comparison would show nothing.
    assert largest_difference(grads, centralized) > 1e-3
    return centralized


def mine(batch: tuple[Tensor, Tensor], parts: int = 1) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of a batch, in equal parts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return list(
        zip(*(t.chunk(size)[rank].chunk(parts) for t in batch), strict=True),
    )


def require_same(model: nn.Module, want: dict[str, Tensor], prefix: str = "") -> None:
    have = {
        name.removeprefix(prefix): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    difference = largest_difference(have, want)
    assert difference <= 1e-12, difference


def ddp_case(
    register: Callable[[nn.Module], Any], kind: type[Net], options: dict[str, Any]
) -> None:
    ddp = DistributedDataParallel(make(kind), **options)
    register(ddp)
    images, labels = mine(data())[0]
    for _ in range(3):  # a static graph, and buckets that were rebuilt, show from the second on
        ddp.zero_grad()
        backward(ddp, images, labels)
        require_same(ddp, expected(kind), "module.")


DDP_CASES: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "plain": (Net, {}),
    "bucket views": (Net, {"gradient_as_bucket_view": True}),
    "static graph": (Net, {"static_graph": True}),
    "static graph, bucket views": (Net, {"static_graph": True, "gradient_as_bucket_view": True}),
    "tiny buckets": (Net, {"bucket_cap_mb": 1e-4}),
    "tiny buckets as views": (Net, {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}),
    "tied": (Tied, {}),
    "unused": (WithUnused, {"find_unused_parameters": True}),
    "checkpointed": (CheckpointedOtherwise, {}),
    "checkpointed, reentrant": (CheckpointedReentrant, {"static_graph": True}),
}
REGISTER = {"tensor hooks": centralize_backward, "comm hook": register_ddp}


@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize("case", DDP_CASES)
def test_ddp(two: Processes, case: str, register: str) -> None:
    two(ddp_case, REGISTER[register], *DDP_CASES[case])
