"""What steps and hooks are made of, counted and held to what is committed for this torch version.

Counts come out the same in every run, so any difference fails, fewer too: what was gained is to be
recorded, or it is lost again unseen. They are for CPUs with vector instructions, of whatever width,
and any number of threads.

    python -m benchmarks.gates.counts --cases adamw-gc-donated hooks-fsdp2
    python -m benchmarks.gates.counts --update                     # make counts

A step is taken five times, with other values and another learning rate each time, and then once
more for its allocations:

- graphs: made by Dynamo in the first step. graph_breaks: in all. recompiles: graphs made later.
- cache_entries: pieces of compiled code held in the end, by Dynamo and by donated steps, whose own
  dispatch Dynamo knows nothing of.
- calls: of compiled graphs, in one step.
- kernels: loops that Inductor generated. bytes: what they and other kernels read and write, by
  Inductor's own accounting: every buffer once for each kernel that uses it. Both of all graphs,
  each called once.
- bytes_least: to read params, gradients and slots once and to write params and slots once, where
  a step is one call.
- allocations, allocated_bytes: of tensors, by one step. Not of whole models, whose convolutions
  need what the machine's library needs.

Of hooks in two processes, the collectives in one backward pass, by torch's names for them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gcfunc
from benchmarks.gates.internals import compiling, held, profiled
from benchmarks.harness import measure, processes
from benchmarks.peers.algorithms import DROP_INS, OURS
from gcfunc import GC
from gcfunc.hooks import centralize_backward, register_ddp

Counts = dict[str, int]
Params = dict[str, Tensor]

VERSION = torch.__version__.partition("+")[0]
EXPECTED = Path(__file__).parents[1] / "expected" / f"torch-{VERSION}.json"
"""Where there is none, another patch of the same minor version serves."""
UPDATE = "`make counts`, or python -m benchmarks.gates.counts --update, records what is found"
STEPS = 5
TIMEOUT = 120.0
"""Seconds for all that two processes count."""

FORMS = ("sgd", "adamw")
"""The algorithms that are counted in their other forms too."""


def cnn() -> nn.Sequential:
    """Convolutions with BatchNorm, three of them alike, and linear layers: 16 tensors, 0.3 MB."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise((3, 32, 32, 32, 32)):
        convolution = nn.Conv2d(into, out, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
    linear = [nn.Linear(288, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), *linear)


def mlp(layers: int = 2) -> nn.Sequential:
    """Layers of one size."""
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(64, 64), nn.Tanh())))


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    """Any loss."""
    return nn.functional.cross_entropy(output, targets)


def images() -> tuple[Tensor, Tensor]:
    """A random batch for the CNN."""
    return torch.randn(4, 3, 6, 6), torch.randint(10, (4,))


def values(model: nn.Module) -> Params:
    """A copy of the model's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Stepping(NamedTuple):
    """What to count.

    Attributes:
        change: Values and learning rate, before the step of a number.
        step: One step.
        stepper: What of gcfunc's may hold compiled code.
    """

    change: Callable[[int], object]
    step: Callable[[], object]
    stepper: object = None


def functional(
    algorithm: str,
    gc: GC | str | None,
    *,
    model: Callable[[], nn.Module] = cnn,
    donate: bool = True,
    packed: bool = False,
) -> Counts:
    """A compiled functional step."""
    opt = gcfunc.compile(OURS[algorithm](gc), donate=donate)
    plain = values(model())
    params: Any = gcfunc.pack(plain) if packed else plain
    state, grads = opt.init(params), params

    def change(t: int) -> None:
        nonlocal state, grads
        state = gcfunc.update_hyperparams(state, lr=0.1 / (t + 1))
        grads = {name: torch.randn_like(p) for name, p in plain.items()}
        if packed:
            grads = gcfunc.pack(grads, like=params)

    def step() -> None:
        nonlocal params, state
        params, state = opt.step(params, grads, state)

    found = count(Stepping(change, step, opt))
    if found["calls"] == 1:
        passes = 3 + 2 * len(state.slots)
        found["bytes_least"] = passes * sum(p.nbytes for p in plain.values())
    return found


def drop_in(algorithm: str, gc: str) -> Counts:
    """The step of a class in gcfunc.optim."""
    model = cnn()
    optimizer = DROP_INS[algorithm]([*model.parameters()], gc=gc, compile=True)

    def change(t: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)

    return count(Stepping(change, optimizer.step, optimizer))


def train_step(algorithm: str, gc: str) -> Counts:
    """A whole training step."""
    compiled = gcfunc.compile(gcfunc.train_step(cnn(), loss_fn, OURS[algorithm](gc)))
    train, batch = compiled.init(), images()

    def change(t: int) -> None:
        nonlocal train, batch
        train = train._replace(state=gcfunc.update_hyperparams(train.state, lr=0.1 / (t + 1)))
        batch = images()

    def step() -> None:
        nonlocal train
        train, _ = compiled(train, *batch)

    return count(Stepping(change, step), allocations=False)


def hooks_compiled(*, hooks: bool = True) -> Counts:
    """Forward and backward of a compiled model, whose weights then change."""
    model = cnn()
    compiled: Any = torch.compile(model)
    batch = images()
    if hooks:
        centralize_backward(model)

    def change(t: int) -> None:
        nonlocal batch
        batch = images()
        for p in model.parameters():
            p.data.sub_(0 if p.grad is None else p.grad, alpha=0.1 / (t + 1))
            p.grad = None

    def step() -> None:
        inputs, targets = batch
        torch.autograd.backward(loss_fn(compiled(inputs), targets))

    return count(Stepping(change, step), allocations=False)


CASES: dict[str, Callable[[], Counts]] = {
    **{
        f"{algorithm}-{gc or 'plain'}-donated": partial(functional, algorithm, gc)
        for algorithm, gc in itertools.product(OURS, (None, "gc", "gcc"))
    },
    **{f"{a}-gc-packed": partial(functional, a, "gc", packed=True) for a in FORMS},
    **{f"{a}-gc-pure": partial(functional, a, "gc", donate=False) for a in FORMS},
    **{f"{a}-gc-drop-in": partial(drop_in, a, "gc") for a in FORMS},
    "sgd-gc-24-layers": partial(functional, "sgd", "gc", model=partial(mlp, 24)),
    "sgd-gc-train-step": partial(train_step, "sgd", "gc"),
    "hooks-compiled": hooks_compiled,
}


def count(stepping: Stepping, *, allocations: bool = True) -> Counts:
    """Take steps, and count."""
    with compiling() as compiled:
        stepping.change(0)
        stepping.step()
        graphs = compiled().graphs
        for t in range(1, STEPS):
            stepping.change(t)
            stepping.step()
        stepping.change(STEPS)
        events = profiled(stepping.step)
        total = compiled()
    found = {
        "graphs": graphs,
        "graph_breaks": total.graph_breaks,
        "recompiles": total.graphs - graphs,
        "cache_entries": total.cache_entries + held(stepping.stepper),
        "calls": sum(name.startswith("## Call CompiledFxGraph") for name, _ in events),
        "kernels": total.kernels,
        "bytes": total.bytes,
    }
    if allocations:
        sizes = [size for name, size in events if name == "[memory]" and size > 0]
        found |= {"allocations": len(sizes), "allocated_bytes": sum(sizes)}
    return found


def ddp(*, hooks: bool) -> DistributedDataParallel:
    """In two buckets."""
    model = DistributedDataParallel(mlp(4), bucket_cap_mb=2 * 64 * 65 * 4 / 2**20)
    if hooks:
        centralize_backward(model)
    return model


def ddp_communication(*, hooks: bool) -> DistributedDataParallel:
    """In two buckets, centralized after communication."""
    model = ddp(hooks=False)
    if hooks:
        register_ddp(model)
    return model


def fsdp2(*, hooks: bool) -> nn.Module:
    """Layer by layer, by rows."""
    model, mesh = mlp(4), init_device_mesh("cpu", (2,))
    for i in range(0, len(model), 2):
        fully_shard(model[i], mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hooks:
        centralize_backward(model)
    return model


def tensor_parallel(*, hooks: bool) -> nn.Module:
    """Every second weight cut along its rows."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    plan |= {"4": ColwiseParallel(), "6": RowwiseParallel()}
    model = mlp(4)
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    if hooks:
        centralize_backward(model)
    return model


TOGETHER: dict[str, Callable[..., nn.Module]] = {
    "hooks-ddp": ddp,
    "hooks-register-ddp": ddp_communication,
    "hooks-fsdp2": fsdp2,
    "hooks-tensor-parallel": tensor_parallel,
}
"""What two processes count together."""


def collectives(case: str, *, hooks: bool = True) -> Counts:
    """Those of one backward pass, in each process of a group."""
    model = TOGETHER[case](hooks=hooks)
    for _ in range(2):  # after the first DDP makes its buckets anew
        model(torch.randn(4, 64)).sum().backward()
        model.zero_grad()
    loss: Tensor = model(torch.randn(4, 64)).sum()
    with CommDebugMode() as communication:  # type: ignore[no-untyped-call]
        loss.backward()  # type: ignore[no-untyped-call]
    counted = communication.get_comm_counts()
    return {str(op).rpartition(".")[2]: number for op, number in counted.items()}


def together(cases: Sequence[str]) -> dict[str, Counts]:
    """:func:`collectives`, as two processes count them."""
    found: list[dict[str, Counts]] = processes.together(2, TIMEOUT, all_collectives, cases)
    if found[0] != found[1]:
        raise RuntimeError(f"the processes do not agree: {found}")
    return found[0]


def all_collectives(cases: Sequence[str]) -> dict[str, Counts]:
    """:func:`collectives` of each case."""
    return {case: collectives(case) for case in cases}


def differences(case: str, found: Counts) -> list[str]:
    """Where a case's counts are not the expected ones, and what to do about it."""
    expected = recorded()
    if expected is None:
        return [f"no counts are recorded for torch {VERSION}; {UPDATE}"]
    if case not in expected:
        return [f"{case}: not recorded; {UPDATE}"]
    return [
        f"{case}: {name}: expected {expected[case].get(name)}, found {found.get(name)}; if it is "
        f"meant to be so, {UPDATE}"
        for name in {**expected[case], **found}
        if expected[case].get(name) != found.get(name)
    ]


def recorded() -> dict[str, Counts] | None:
    """The expected counts for this version of torch."""
    files = [EXPECTED]
    if not EXPECTED.exists():
        files = sorted(EXPECTED.parent.glob(f"{EXPECTED.stem.rpartition('.')[0]}.*.json"))
    if not files:
        return None
    found: dict[str, Counts] = json.loads(files[-1].read_text())
    return found


def record(found: Mapping[str, Counts]) -> None:
    """Expect these, and of cases that there still are what was expected."""
    every = {**(recorded() or {}), **found}
    kept = {case: every[case] for case in (*CASES, *TOGETHER) if case in every}
    EXPECTED.parent.mkdir(exist_ok=True)
    EXPECTED.write_text(json.dumps(kept, indent=1) + "\n")


def tables(found: Mapping[str, Counts]) -> str:
    """Markdown, a table for each set of quantities."""
    by_head: dict[tuple[str, ...], list[list[object]]] = {}
    for case, counts in found.items():
        row: dict[str, object] = {**counts}
        if "bytes_least" in counts:
            row["bytes / bytes_least"] = f"{counts['bytes'] / counts['bytes_least']:.3f}"
        by_head.setdefault(("case", *row), []).append([case, *row.values()])
    return "\n\n".join(measure.table(head, rows) for head, rows in by_head.items())


def main() -> None:
    """Count, print, and compare or record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*CASES, *TOGETHER]
    parser.add_argument("--cases", nargs="+", default=every, choices=every, metavar="CASE")
    parser.add_argument("--update", action="store_true", help="record what is found")
    args = parser.parse_args()
    found = {}
    for case in args.cases:
        if case in CASES:
            try:
                found[case] = CASES[case]()
            except Exception as error:
                error.add_note(f"in case {case}")
                raise
    if communicating := [case for case in args.cases if case in TOGETHER]:
        found |= together(communicating)
    print(tables(found))
    if args.update:
        record(found)
    elif failures := [line for case in found for line in differences(case, found[case])]:
        sys.exit("\n".join(dict.fromkeys(failures)))


if __name__ == "__main__":
    main()
