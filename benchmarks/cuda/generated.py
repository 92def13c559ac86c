"""What Inductor generates for a function, before anything of it is compiled or run."""

import ast
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A call that stands in the wrapper: what is called, and with what, as text."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Generated:
    """What Inductor generated for one graph.

    Attributes:
        source: The wrapper, a Python module whose ``call(args)`` launches the kernels.
        kernels: The source of each Triton kernel, by name.
        launches: Their launches, in order.
        externs: All other calls that do work: operators (``torch.ops.*``), ``extern_kernels``,
            copies between devices, kernels for the CPU.
        temporaries: The bytes of each buffer that is allocated and is not a result, by name.
        outputs: The bytes of each buffer that is allocated and is one.
        items: How many numbers are read from tensors, by ``.item()``.
        inputs: The FakeTensors that ``call`` was given.
        moves: The positions of inputs that are written and are not known to stay where they are,
            for which Inductor makes no CUDA graph.
    """

    source: str
    kernels: dict[str, str]
    launches: list[Call]
    externs: list[Call]
    temporaries: dict[str, int]
    outputs: dict[str, int]
    items: int
    inputs: tuple[Tensor, ...]
    moves: frozenset[int]


def generate(function: Callable[..., object], *args: Any, **kwargs: Any) -> Generated:
    """What Inductor generates for ``torch.compile(function, **kwargs)(*args)``, with FakeTensors.

    On fake CUDA tensors this needs :func:`~benchmarks.cuda.fake.fake_cuda`.
    """
    torch.compiler.reset()
    compiled = torch.compile(function, **{"fullgraph": True, "dynamic": False, **kwargs})
    (found,) = generated_by(lambda: compiled(*args))
    return found


def generated_by(call: Callable[[], object]) -> list[Generated]:
    """What Inductor generates while ``call`` runs, for each graph that is called in it.

    Graphs are replaced by such as only make their results, empty; so ``call`` must not ask for
    values, which FakeTensors do not have.
    """
    from torch._inductor.compile_fx import _InProcessFxCompile
    from torch._inductor.graph import GraphLowering

    found: list[Generated] = []
    stay: list[int] = []
    real = _InProcessFxCompile.codegen_and_compile

    def generating(compiler: Any, graph: Any, inputs: Any, checked: Any, kwargs: Any) -> Any:
        stay[:] = kwargs.get("static_input_idxs") or ()
        return real(compiler, graph, inputs, checked, kwargs)

    def stop(lowering: Any) -> Any:
        source: str = lowering.codegen()[0].value
        (output,) = lowering.graph.find_nodes(op="output")
        results = [node and node.meta["val"] for node in output.args[0]]
        moves = frozenset(lowering.mutated_input_idxs).difference(stay)

        def call(args: list[Any]) -> list[Any]:
            found.append(_read(source, tuple(args), moves))
            return [_another(r) if isinstance(r, Tensor) else r for r in results]

        return SimpleNamespace(call=call)

    with (
        # torch's own tests stop here as well (torch._inductor.utils.get_code), but for graphs
        # without results, and without telling what these are called with.
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        # Which inputs stay where they are is known here alone.
        mock.patch.object(_InProcessFxCompile, "codegen_and_compile", generating),
        torch._inductor.config.patch(fx_graph_cache=False),
        warnings.catch_warnings(),
    ):
        # Inductor looks whether inputs are aligned; FakeTensors are.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        # Advice to whoever has an H100.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        call()
    return found


def _another(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


_BOOKKEEPING = {
    "AsyncCompile",
    "assert_alignment",
    "assert_size_stride",
    "assert_size_stride_grouped",
    "copy_if_misaligned",
    "copy_misaligned",
    "get_raw_stream",
    "reinterpret_tensor",
    "torch.cuda._DeviceGuard",
    "torch.cuda.set_device",
}
"""What a wrapper calls besides, and no tensor is touched by."""


def _read(source: str, inputs: tuple[Tensor, ...], moves: frozenset[int]) -> Generated:
    """Take a wrapper's source apart."""
    tree = ast.parse(source)
    kernels = _kernels(tree)
    body = _body(tree)
    launches: list[Call] = []
    externs: list[Call] = []
    buffers: dict[str, int] = {}
    sizes: list[int] = []
    items = 0
    calls = [node for node in ast.walk(body) if isinstance(node, ast.Call)]
    for node in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        name = ast.unparse(node.func)
        owner, _, method = name.rpartition(".")
        keywords = [keyword for keyword in node.keywords if keyword.arg != "stream"]
        given: list[ast.expr | ast.keyword] = [*node.args, *keywords]
        call = Call(name, tuple(map(_text, given)))
        if method == "run" and owner in kernels:
            launches.append(Call(owner, call.arguments))
        elif method == "item":
            items += 1
        elif name.startswith("empty_strided_"):
            sizes.append(_nbytes(node))
        elif name not in _BOOKKEEPING and name != "args.clear":
            externs.append(call)
    same: dict[str, str] = {}
    for statement in ast.walk(body):
        match statement:
            case ast.Assign([ast.Name(new)], ast.Call(ast.Name(function)) as node):
                if function.startswith("empty_strided_"):
                    buffers[new] = _nbytes(node)
                elif function == "reinterpret_tensor":
                    same[new] = ast.unparse(node.args[0])
            case ast.Assign([ast.Name(new)], ast.Name(old)):
                same[new] = old
    if len(buffers) != len(sizes):
        raise RuntimeError(f"{len(sizes)} buffers are allocated, {len(buffers)} of them have names")
    results = {*_results(body, same)}
    return Generated(
        source,
        kernels,
        launches,
        externs,
        {name: size for name, size in buffers.items() if name not in results},
        {name: size for name, size in buffers.items() if name in results},
        items,
        inputs,
        moves,
    )


def _text(argument: ast.expr | ast.keyword) -> str:
    if isinstance(argument, ast.keyword):
        return f"{argument.arg}={ast.unparse(argument.value)}"
    return ast.unparse(argument)


def _kernels(tree: ast.Module) -> dict[str, str]:
    found = {}
    for node in tree.body:
        match node:
            case ast.Assign([ast.Name(name)], ast.Call(called, [_, ast.Constant(str(text)), *_])):
                if ast.unparse(called) == "async_compile.triton":
                    found[name] = text
    return found


def _body(tree: ast.Module) -> ast.FunctionDef:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    if any(function.name.startswith("partition_") for function in functions):
        raise RuntimeError("the graph is partitioned: compile it with graph_partition=False")
    (body,) = (function for function in functions if function.name == "call")
    return body


def _results(body: ast.FunctionDef, same: dict[str, str]) -> Iterator[str]:
    """The names of what is returned, as they were when it was allocated."""
    for statement in ast.walk(body):
        if isinstance(statement, ast.Return) and statement.value is not None:
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Name):
                    name = node.id
                    while name in same:
                        name = same[name]
                    yield name


def _nbytes(node: ast.Call) -> int:
    """What ``empty_strided_cuda(size, stride, dtype)`` allocates."""
    try:
        size, stride = (ast.literal_eval(argument) for argument in node.args[:2])
    except ValueError:
        raise RuntimeError(f"a size is not a number: {ast.unparse(node)}") from None
    dtype: torch.dtype = getattr(torch, ast.unparse(node.args[2]).removeprefix("torch."))
    if not prod(size):
        return 0
    elements: int = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    return elements * dtype.itemsize
