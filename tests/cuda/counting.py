"""What gcfunc's steps launch and move. `test_generated.py` runs this in a process of its own."""

from unittest import mock

import pytest
import torch
from torch import nn

import gcfunc
from benchmarks.cuda.generated import generated_by
from benchmarks.cuda.registers import assembled
from benchmarks.cuda.rows import OPERATORS
from benchmarks.cuda.steps import eager_step, machine_code, optimizer_step
from benchmarks.cuda_code import BEGIN, CASES, COUNTED, END, PAGE, counted, expected, table
from benchmarks.harness.shapes import MODELS, Shapes, gpt2
from benchmarks.peers.algorithms import COMPARED, OURS
from gcfunc import Units
from gcfunc._centralization.kinds import _row_by_row
from gcfunc._rows import fit
from gcfunc._rows.launch import compiled_in, kernels_of
from gcfunc._rows.layout import shape_of
from gcfunc._rows.program import program_of

SMALL: Shapes = {"conv": (8, 3, 7, 7), "linear": (10, 2048), "long": (2, 9000), "bias": (10,)}


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_recorded(case: str) -> None:
    found = counted(**CASES[case])
    assert {name: found[name] for name in COUNTED} == expected()[case]
    # The least there can be, whatever is recorded.
    assert found["passes"] == found["least_passes"]
    assert found["temporaries"] == 0
    assert found["launches"] <= 8


def test_all_that_is_recorded_is_counted() -> None:
    assert {*expected()} == {*CASES}


def test_the_page_has_what_is_recorded() -> None:
    assert BEGIN + table() + END in PAGE.read_text("utf-8")


@pytest.mark.parametrize("algorithm", COMPARED)
def test_kernels_spill_no_registers_and_read_vectors(algorithm: str) -> None:
    step = optimizer_step(OURS[algorithm]("gc"), MODELS["resnet50"]())
    _, compiled = machine_code(step.graphs, step.rows)
    assert len(compiled) == 6
    for kernel in compiled:
        assert kernel.registers <= 128
        assert kernel.spilled == 0
        # Rows of 147 alone, of the stem, are read number by number.
        assert kernel.vector_loads >= 12 or kernel.blocks["VECTOR"] == 1
    assert sum(kernel.blocks["VECTOR"] == 1 for kernel in compiled) == 1


@pytest.mark.parametrize(("width", "vector"), [(64, True), (9216, True), (63, False)])
def test_the_kernel_for_one_gradient_reads_vectors(width: int, vector: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    program = program_of(_row_by_row, torch.float32, 1, (), alone=True)
    assert program is not None
    shape = shape_of(width, 4 if vector else 1)
    constants = compiled_in(shape, torch.float32)
    warps = constants.pop("num_warps")
    given = {"at_0": "*fp32", "at_1": "*fp32", "width": "i32", "numel": "i32"}
    kernel = kernels_of(program)[shape.long]
    # As Triton's own launcher does it: of widths it must not ask whether they are multiples.
    named = [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
    assert named == ["at_0", "at_1"]
    binary = triton.compile(
        ASTSource(
            kernel,
            given | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in range(2)},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    found = assembled(binary.asm["ptx"], constants, warps)
    assert found.spilled == 0
    assert (found.vector_loads == found.loads) is vector
    assert (found.vector_loads > 0) is vector


def test_depth_changes_nothing() -> None:
    shallow, deep = (optimizer_step(OURS["adamw"]("gc"), gpt2(n)) for n in (2, 48))
    assert shallow.launches == deep.launches
    kernels = [{(r.source, n.shape) for r in s.rows for n in r.launches} for s in (shallow, deep)]
    assert kernels[0] == kernels[1]


def test_what_the_row_kernel_cannot_take_is_fused_by_inductor() -> None:
    gc = gcfunc.GC(where=lambda name, t: Units(dim=1) if name == "linear" else t.ndim > 1)
    step = optimizer_step(OURS["sgd"](gc), SMALL)
    (graph,) = step.graphs
    assert len(graph.launches) == 1
    assert not graph.externs
    assert step.scalars == ["aten.add_.Tensor"]  # the counter's; others are made in the kernels
    assert step.temporaries == 0
    assert step.passes == pytest.approx(5, abs=0.01)


def test_a_pure_step_reads_and_writes_no_more() -> None:
    step = optimizer_step(OURS["adamw"]("gc"), SMALL, donate=False)
    (graph,) = step.graphs
    assert [call.name for call in graph.externs] == [OPERATORS[1]]
    assert step.passes == pytest.approx(7, abs=0.01)
    assert step.temporaries == 0
    (rows,) = step.rows
    # The count and the copies of hyperparameters.
    assert step.launches == len(rows.launches) + 2


def test_an_eager_step_centralizes_each_gradient_in_one_launch() -> None:
    shapes = MODELS["resnet50"]()
    weights = [shape for shape in shapes.values() if len(shape) > 1]
    for algorithm in COMPARED:
        own, plain = (eager_step(OURS[algorithm](gc), shapes) for gc in ("gc", None))
        assert own.rows == len(weights)
        assert own.launches == plain.launches + len(weights)
        assert own.passes - plain.passes == pytest.approx(2, abs=0.01)  # all but vectors


def test_a_training_step_updates_in_place_in_its_graph() -> None:
    """On the CPU: without a GPU, CUDA builds of torch have no backward pass for fake tensors."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    train_step = gcfunc.train_step(model, nn.functional.cross_entropy, OURS["adamw"]("gc"))
    inputs, targets = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    with mock.patch.object(fit, "DEVICES", ("cpu",)):
        step = gcfunc.compile(train_step, dynamic=False)
        train = step.init()
        (graph,) = generated_by(lambda: step.step(train, inputs, targets))
    (call,) = (call for call in graph.externs if call.name in OPERATORS)
    assert call.name == OPERATORS[0]
    params, slots, *_ = call.arguments
    # The graph's own inputs, and copied nowhere.
    names = [name.strip() for group in (params, slots) for name in group.strip("[]").split(",")]
    assert len(names) == 3 * len(train.params)
    assert all(name.startswith("arg") for name in names)
    others = [given for c in graph.externs if c != call for given in c.arguments if given in names]
    assert {*others} <= {*call.arguments[0].strip("[]").split(", ")}  # the model reads its params


@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_what_cuda_graphs_write_stays_where_it_is(mode: str) -> None:
    """Inductor makes none otherwise."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    train_step = gcfunc.train_step(model, nn.functional.mse_loss, OURS["sgd"]("gc"))
    with mock.patch.object(fit, "DEVICES", ("cpu",)):
        step = gcfunc.compile(train_step, mode=mode, dynamic=False)
        train = step.init()
        (graph,) = generated_by(lambda: step.step(train, torch.randn(3, 4), torch.randn(3, 4)))
    written = 2 * len(train.params) + len(train.buffers)
    assert len(graph.moves) == (0 if mode == "reduce-overhead" else written)
