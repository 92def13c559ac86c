"""A whole compiled training step with GC, against the ordinary compiled loop without.

The ordinary loop is ``torch.compile(model)``, ``loss.backward()`` and torch.optim's fused step.

    python -m benchmarks.train_step --models cnn
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gcfunc
from benchmarks import measure, peers

Step = Callable[[], object]


class Task(NamedTuple):
    """A model with a batch."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def to(self, device: str) -> Task:
        """The same there."""
        return Task(self.model.to(device), self.inputs.to(device), self.targets.to(device))


def cnn() -> Task:
    """Four convolutions with BatchNorm on 32 images of 32 by 32."""
    widths = (3, 32, 64, 128, 256)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        convolution = nn.Conv2d(into, out, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * widths[-1], 10))
    return Task(model, torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))


def transformer() -> Task:
    """Four layers of width 128 on 8 sequences of 64."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return Task(nn.Sequential(model, nn.Linear(128, 10)), *_sequences())


def _sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 64, 128), torch.randint(10, (8, 64))


MODELS: dict[str, Callable[[], Task]] = {"cnn": cnn, "transformer": transformer}


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over the last dimension."""
    return nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten())


def ordinary(task: Task, algorithm: str, *, compiled: bool) -> Step:
    """Module, autograd and torch.optim."""
    model = copy.deepcopy(task.model)
    forward: Any = torch.compile(model) if compiled else model
    opt = peers.TORCH[algorithm](model.parameters(), fused=True)

    def step() -> None:
        opt.zero_grad()
        torch.autograd.backward(loss_fn(forward(task.inputs), task.targets))
        opt.step()

    return step


def ours(task: Task, algorithm: str, *, gc: str | None, donate: bool) -> Step:
    """gcfunc's one graph."""
    opt = peers.OURS[algorithm](gc)
    step = gcfunc.compile(gcfunc.train_step(task.model, loss_fn, opt), donate=donate)
    train = step.init()

    def again() -> None:
        nonlocal train
        train, _ = step(train, task.inputs, task.targets)

    return again


CANDIDATES: dict[str, Callable[[Task, str], Step]] = {
    "gcfunc": lambda task, algorithm: ours(task, algorithm, gc="gc", donate=True),
    "gcfunc, no GC": lambda task, algorithm: ours(task, algorithm, gc=None, donate=True),
    "gcfunc, pure": lambda task, algorithm: ours(task, algorithm, gc="gc", donate=False),
    "not compiled, no GC": lambda task, algorithm: ordinary(task, algorithm, compiled=False),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--algorithms", nargs="+", default=["sgd", "adamw"], choices=peers.COMPARED)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--device", default=measure.device())
    args = parser.parse_args()
    rows = []
    lines: list[list[object]] = []
    for model in args.models:
        for algorithm in args.algorithms:
            lines.append([model, algorithm, ""])
            for candidate in args.candidates:
                torch.manual_seed(0)
                task = MODELS[model]().to(args.device)
                baseline = ordinary(task, algorithm, compiled=True)
                step = CANDIDATES[candidate](task, algorithm)
                result = measure.against(step, baseline, args.device)
                rows.append(
                    {"model": model, "algorithm": algorithm, "candidate": candidate}
                    | result._asdict()
                )
                lines[-1][2] = f"{1e3 * result.baseline:.1f} ms"
                lines[-1].append(f"{result.ratio:.2f}")
                print(
                    f"{model} {algorithm} {candidate}: {result.ratio:.2f} "
                    f"[{result.low:.2f}, {result.high:.2f}], {1e3 * result.seconds:.1f} ms",
                    flush=True,
                )
                torch.compiler.reset()
    head = ["model", "algorithm", "compiled model, fused, no GC", *args.candidates]
    measure.report("train_step", measure.table(head, lines), rows, args.device)


if __name__ == "__main__":
    main()
