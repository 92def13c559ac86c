"""Models of which several paths lead to one module, one tensor, or both."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

IDS = torch.arange(3)


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out


class TwoContainers(nn.Module):
    """One layer twice in one container, again in another, and a container under two names."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(4, 4)
        self.first = nn.Sequential(layer, nn.Tanh(), layer)
        self.second = nn.ModuleDict({"a": nn.Linear(4, 4), "b": layer})
        self.third = self.second

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third["b"](self.second["a"](self.first(x)))
        return out


class SharedNorm(nn.Module):
    """A BatchNorm on two paths: buffers are written twice a forward."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), norm) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TiedAndShared(nn.Module):
    """An Embedding's weight that is a Linear's, too, around a block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.blocks = nn.ModuleList([self.block, self.block])
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.heads = nn.ModuleList([self.head])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(IDS) + x[: len(IDS)]
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.heads[0](h)
        return out


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(4, 4))
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


class TiedBuffers(nn.Module):
    """Two names of one module for one buffer, and the module under two names."""

    seen: Tensor
    shift: Tensor

    def __init__(self, inner: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        zeros = torch.zeros(4)
        self.register_buffer("seen", zeros)
        self.register_buffer("shift", zeros)
        if inner:
            self.one = TiedBuffers(inner=False)
            self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.detach().mean(0))
        out: Tensor = self.layer(x) + self.shift
        return self.two(self.one(out)) if hasattr(self, "one") else out


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([TwoContainers(), SharedNorm(), Parametrized(), TiedBuffers()])
        self.again = nn.ModuleList([self.parts, self.parts[0]])
        self.last = TiedAndShared()

    def forward(self, x: Tensor) -> Tensor:
        for part in [*self.parts, self.again[1]]:
            x = part(x)
        out: Tensor = self.last(x)
        return out


SHARED: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        TwoNames,
        TwoContainers,
        SharedNorm,
        TiedAndShared,
        Parametrized,
        TiedBuffers,
        Everything,
    )
}


def batch(seed: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SHARED[name]().double()


def loss_of(out: Tensor) -> Tensor:
    return (out.tanh() - 0.5).square().mean()
