"""What a whole step of gcfunc launches on a GPU, counted on one that is not there."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import gcfunc
from benchmarks.cuda.fake import fake_cuda
from benchmarks.cuda.generated import Generated, generated_by
from benchmarks.cuda.passes import launched, total
from benchmarks.cuda.registers import Compiled, compiled
from benchmarks.cuda.rows import OPERATORS, Rows, in_graph, recorded
from gcfunc import Optimizer
from gcfunc._rows import fit

Trees = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Step:
    """What one step does on the device.

    Attributes:
        graphs: What Inductor generated.
        rows: The calls of the row kernel, in graphs or outside.
        scalars: Launches besides: of the step's count, and of whatever scalars are not computed
            where they are used.
        numel: Of all parameters.
        itemsize: Of one of their numbers.
        seconds: Until Inductor and the row kernel were done with the first step, the compilation
            of their kernels aside.
    """

    graphs: list[Generated]
    rows: list[Rows]
    scalars: list[str]
    numel: int
    itemsize: int
    seconds: float

    @property
    def launches(self) -> int:
        """All of them."""
        calls = [call for graph in self.graphs for call in graph.externs]
        return (
            sum(len(rows.launches) for rows in self.rows)
            + sum(len(graph.launches) for graph in self.graphs)
            + sum(call.name not in OPERATORS for call in calls)
            + len(self.scalars)
        )

    @property
    def moved(self) -> int:
        """The bytes between memory and device."""
        own = sum(sum(r.moved(launch)) for r in self.rows for launch in r.launches)
        graphs = (section for g in self.graphs for sections in launched(g) for section in sections)
        return own + total(graphs).moved

    @property
    def passes(self) -> float:
        """As often as all parameters would be read or written for that."""
        return self.moved / (self.numel * self.itemsize)

    @property
    def temporaries(self) -> int:
        """Buffers that graphs allocate and do not return."""
        return sum(len(graph.temporaries) for graph in self.graphs)


def optimizer_step(
    opt: Optimizer,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    packed: bool = False,
    donate: bool = True,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Step:
    """The step of an optimizer for parameters of these shapes, compiled."""
    like: Any = {
        name: torch.empty(shape, dtype=dtype, device="cpu") for name, shape in shapes.items()
    }
    like = gcfunc.pack(like) if packed else like  # which reads addresses
    with device():
        params = tree_map(lambda t: torch.empty_like(t, device="cuda"), like)
        grads = tree_map(torch.empty_like, params)
        step = gcfunc.compile(opt, donate=donate, **kwargs)
        state = step.init(params)

        def call() -> None:
            step.step(params, grads, state)

        return _counted(call, params, donated=step if donate else None)


def training_step(
    make: Callable[[], nn.Module],
    loss: Any,
    opt: Optimizer,
    given: Callable[[], tuple[Tensor, ...]],
    **kwargs: Any,
) -> Step:
    """A whole training step, donated, of a model and on a batch that are made on the device."""
    with device(), torch.device("cuda"):
        step = gcfunc.compile(gcfunc.train_step(make(), loss, opt), **kwargs)
        train = step.init()
        batch = given()
        return _counted(lambda: step.step(train, *batch), train.params, donated=step)


def _counted(call: Callable[[], object], params: Any, donated: Any) -> Step:
    start = time.perf_counter()
    with recorded() as outside:
        graphs = generated_by(call)
        rows = [*outside, *(row for graph in graphs for row in in_graph(graph))]
        scalars = [] if donated is None else _outside(call, donated)
    seconds = time.perf_counter() - start
    leaves = tree_leaves(params)
    numel = sum(t.numel() for t in leaves)
    return Step(graphs, rows, scalars, numel, leaves[0].itemsize, seconds)


def machine_code(graphs: list[Generated], rows: list[Rows]) -> tuple[float, list[Compiled]]:
    """All kernels compiled for an H100, each of them once, and the seconds that this took."""
    import triton

    start = time.perf_counter()
    kernels = {source for graph in graphs for source in graph.kernels.values()}
    distinct = {
        (row.source, launch.shape): (row, launch) for row in rows for launch in row.launches
    }
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        found = [row.compiled(launch) for row, launch in distinct.values()]
        if kernels:
            with fake_cuda():
                found += map(compiled, kernels)
    return time.perf_counter() - start, found


@dataclass(frozen=True)
class Eager:
    """A step that is not compiled.

    Attributes:
        launches: Operations on the device, of which torch may split those of many tensors.
        passes: Of all that they read and write.
        rows: How many of the launches centralize a gradient, reading and writing it once.
    """

    launches: int
    passes: float
    rows: int


def eager_step(opt: Optimizer, shapes: Mapping[str, tuple[int, ...]]) -> Eager:
    """The pure step of an optimizer, not compiled, for parameters of these shapes."""
    rows: list[int] = []

    def on_rows(formula: object, g: Tensor) -> Tensor | None:
        """The kernel for one gradient, which takes no fakes."""
        if not fit.in_rows([g]):
            return None
        rows.append(2 * g.nbytes)
        return torch.empty_strided(g.size(), g.stride(), dtype=g.dtype, device=g.device)

    with device():
        params = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
        grads, state = tree_map(torch.empty_like, params), opt.init(params)
        with mock.patch("gcfunc._centralization.kinds.on_rows", on_rows), _Outside() as outside:
            opt.step(params, grads, state)
        numel = sum(t.numel() for t in params.values())
    passes = (outside.moved + sum(rows)) / (4 * numel)
    return Eager(len(outside.found) + len(rows), passes, len(rows))


class _Outside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is computed on the device, and the bytes of what that reads and writes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, made))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        # Views launch nothing, and are marked by their schema.
        on_device = any(t.device.type == "cuda" for t in tensors)
        computes = func.namespace != "prim" and not str(func).startswith("aten.empty")
        if on_device and computes and not func.is_view:
            self.found.append(str(func))
            self.moved += sum(t.nbytes for t in tensors)
        return made


def _outside(call: Callable[[], object], step: Any) -> list[str]:
    """What a donated step launches besides its graphs and the row kernel."""
    outside = _Outside()
    planned = step._planned if hasattr(step, "_planned") else step.planned
    plan, graphs = planned._serving
    nothing = mock.Mock()
    nothing.compiled_for.return_value = lambda *arguments: None
    planned._serving = plan, [nothing for _ in graphs]
    try:
        with outside:
            call()
    finally:
        planned._serving = plan, graphs
    return outside.found


@contextmanager
def device() -> Iterator[None]:
    """A CUDA device with fake tensors, of which one is as good as another."""
    with ExitStack() as stack:
        stack.enter_context(fake_cuda())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # All fakes lie at the address 0, and would be taken for one tensor.
        stack.enter_context(mock.patch("gcfunc._compiled.plan._require_own_memory"))
        stack.enter_context(mock.patch("gcfunc._compiled.plan._storage", id))
        stack.enter_context(mock.patch("gcfunc._compiled.row_step._PLAIN", frozenset({FakeTensor})))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield
