"""Models that tests of several wings train."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ConvNet(nn.Module):
    """A convolution, a norm with buffers, dropout if asked for, and a linear layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.drop(features))


class TiedMLP(nn.Module):
    """One weight under two names, and used a third time without one."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.out.weight = self.hidden.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.out(torch.tanh(self.hidden(x))))
        return F.linear(x, self.hidden.weight.t())


class Net(nn.Module):
    """Convolutions, linear layers and a position table, of rows that no two processes share."""

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


class Strided(Net):
    """Weights in channels_last, transposed, and with gaps."""

    def __init__(self) -> None:
        super().__init__()
        filters = torch.randn(3, 5, 3, 3, dtype=torch.float64)
        self.conv2.weight = nn.Parameter(filters.to(memory_format=torch.channels_last))
        self.fc.weight = nn.Parameter(torch.randn(48, 7, dtype=torch.float64).t())
        self.out.weight = nn.Parameter(torch.randn(3, 9, dtype=torch.float64)[:, :7])


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
