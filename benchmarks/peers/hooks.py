"""What hooks add to forward and backward, as a ratio to the same model without them.

One model takes turns with and without hooks, so that its weights lie at the same place. Every turn
begins with a step that is not timed: memory is then laid out as that way of stepping leaves it.

    python -m benchmarks.peers.hooks --models mlp --modes eager --processes 1
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import measure, processes
from benchmarks.peers.steps import centralize_by_loop
from benchmarks.peers.tasks import Step, Task, cnn, loss_fn, mlp, resnet50, transformer
from gcfunc.hooks import centralize_backward, register_ddp

TIMEOUT = 600.0
"""Seconds for all that several processes do with one model."""

Row = dict[str, Any]


class Model(NamedTuple):
    """A task, and how many of its steps are timed at once."""

    task: Callable[[], Task]
    steps: int = 1


MODELS = {
    "cnn": Model(cnn),
    "resnet50": Model(resnet50),
    "resnet50_64": Model(partial(resnet50, 64)),
    "mlp": Model(mlp, steps=8),
    "transformer": Model(transformer),
}


class Way(NamedTuple):
    """A way of stepping: steps to repeat, within what is set up before and undone after them."""

    step: Step
    within: Callable[[], AbstractContextManager[object]] = nullcontext


class Setting(NamedTuple):
    """A model that is ready to run.

    Attributes:
        task: The task with the bare model.
        forward: The model as it is called, compiled or in DDP.
        wrap: How ``forward`` was made of the model.
    """

    task: Task
    forward: Any
    wrap: Callable[[nn.Module], Any]

    def step(self, forward: Any = None) -> None:
        """Forward and backward."""
        forward = self.forward if forward is None else forward
        forward.zero_grad(set_to_none=True)
        torch.autograd.backward(loss_fn(forward(self.task.inputs), self.task.targets))


def unhooked(setting: Setting) -> Way:
    """Just that. Its ratio, which should be 1, says how much noise there is."""
    return Way(setting.step)


def hooked(setting: Setting) -> Way:
    """Tensor hooks."""
    return Way(setting.step, partial(centralize_backward, setting.task.model))


def loop(setting: Setting) -> Way:
    """A Python loop after ``loss.backward()``."""

    def step() -> None:
        setting.step()
        centralize_by_loop(setting.task.model.parameters())

    return Way(step)


def communicated(setting: Setting) -> Way:
    """A communication hook, on a copy, as DDP cannot remove it."""
    ddp = setting.wrap(copy.deepcopy(setting.task.model))
    register_ddp(ddp)
    return Way(partial(setting.step, ddp))


CANDIDATES: dict[str, Callable[[Setting], Way]] = {
    "centralize_backward": hooked,
    "register_ddp": communicated,
    "loop after backward": loop,
    "unhooked": unhooked,
}


def prepare(model: str, mode: str, *, ddp: bool, device: str = "cpu") -> Setting:
    """A model with its batch, the same in every process and for every candidate."""
    torch.manual_seed(0)
    task = MODELS[model].task().to(device)

    def wrap(bare: nn.Module) -> Any:
        forward: Any = torch.compile(bare) if mode == "compiled" else bare
        return DistributedDataParallel(forward) if ddp else forward

    return Setting(task, wrap(task.model), wrap)


def rows(
    model: str, mode: str, candidates: list[str], budget: float | None, device: str = "cpu"
) -> Iterator[Row]:
    """Measure, in this process or together with the others of its group."""
    ddp = dist.is_initialized()
    size = dist.get_world_size() if ddp else 1
    agree = all_agree if ddp else bool
    setting = prepare(model, mode, ddp=ddp, device=device)
    baseline = unhooked(setting)
    for candidate in candidates:
        if candidate == "register_ddp" and not ddp:
            continue
        way = CANDIDATES[candidate](setting)
        timer = partial(turn, steps=MODELS[model].steps, agree=agree)
        result = measure.against(way, baseline, device, budget, timer=timer, agree=agree)
        names = {"model": model, "mode": mode, "processes": size, "candidate": candidate}
        yield names | {"threads": torch.get_num_threads()} | result._asdict()
    torch.compiler.reset()


def turn(way: Way, device: str, *, steps: int, agree: Callable[[bool], bool]) -> float:
    """Seconds for a step, after one that is not timed."""

    def several() -> None:
        for _ in range(steps):
            way.step()

    with way.within():
        way.step()
        agree(True)  # so that none waits for another that is still setting up
        return measure.seconds(several, device) / steps


def all_agree(go_on: bool) -> bool:
    """Whether every process of the group would; none goes on before all have answered."""
    answer = torch.tensor(int(go_on))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def together(
    model: str, mode: str, candidates: list[str], budget: float | None, *, size: int = 2
) -> list[Row]:
    """:func:`rows` in DDP's processes of one thread each, as the first measures them."""
    found: list[Row]
    found, *_ = processes.together(size, TIMEOUT, all_rows, model, mode, candidates, budget)
    return found


def all_rows(*args: Any) -> list[Row]:
    """:func:`rows`."""
    return [*rows(*args)]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    modes = ["eager", "compiled"]
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes)
    parser.add_argument("--processes", nargs="+", type=int, help="1 and 2; 1 off the CPU")
    parser.add_argument("--device", default=measure.device())
    asked = [candidate for candidate in CANDIDATES if candidate != "unhooked"]
    parser.add_argument("--candidates", nargs="+", default=asked, choices=CANDIDATES)
    parser.add_argument("--seconds", type=float, help="for each figure")
    args = parser.parse_args()
    # Several processes talk through gloo, on the CPU.
    sizes = args.processes or ([1, 2] if args.device == "cpu" else [1])
    if args.device != "cpu" and max(sizes) > 1:
        parser.error("several processes are measured on the CPU only")
    found: list[Row] = []
    lines: list[list[object]] = []
    for model, size, mode in itertools.product(args.models, sizes, args.modes):
        measured = partial(rows, device=args.device) if size == 1 else partial(together, size=size)
        by: dict[str, Row] = {}
        for row in measured(model, mode, args.candidates, args.seconds):
            by[row["candidate"]] = row
            print(
                f"{model} {mode} {size} {row['candidate']}: {row['ratio']:.3f} "
                f"[{row['low']:.3f}, {row['high']:.3f}], {1e3 * row['seconds']:.2f} ms",
                flush=True,
            )
        found += by.values()
        baselines = sorted(1e3 * row["baseline"] for row in by.values())
        ratios = [f"{by[c]['ratio']:.3f}" if c in by else "" for c in args.candidates]
        lines.append([model, mode, size, f"{baselines[len(baselines) // 2]:.2f} ms", *ratios])
    head = ["model", "mode", "processes", "without hooks", *args.candidates]
    measure.report("peers.hooks", measure.table(head, lines), found, args.device)


if __name__ == "__main__":
    main()
