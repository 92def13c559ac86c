"""What is generated, counted. `test_generated.py` runs this in a process of its own."""

from math import prod

import pytest
import torch
from torch import Tensor

from benchmarks.cuda import fake
from benchmarks.cuda.fake import fake_cuda
from benchmarks.cuda.generated import generate, generated_by
from benchmarks.cuda.passes import Section, launched, total
from benchmarks.cuda.registers import compiled
from tests.cuda.functions import (
    COMBO,
    LOOPED,
    PERSISTENT,
    SHAPES,
    SPLIT,
    Shape,
    device,
    each,
    empty,
    generate_step,
    lists,
    step_on,
)


def test_an_elementwise_function_loads_and_stores_once() -> None:
    with device():
        found = generate(lambda x, y: x * y + 1, empty(50, 40), empty(50, 40))
    assert launched(found) == [[Section("none", 2000, 1, 16000, 8000, 24000)]]
    assert found.outputs == {"buf0": 8000}
    assert not found.temporaries
    assert not found.externs


def test_what_is_broadcast_is_loaded_once() -> None:
    with device():
        found = generate(lambda x, row: x * row, empty(50, 40), empty(40))
    ((section,),) = launched(found)
    assert (section.loaded, section.stored, section.issued) == (8160, 8000, 16160)


def test_a_transposed_tensor_is_loaded_once() -> None:
    with device():
        found = generate(lambda x, y: x + y.t(), empty(50, 40), empty(40, 50))
    assert total(section for launch in launched(found) for section in launch).moved == 24000


@pytest.mark.parametrize(
    ("shape", "rows", "issued"), [(PERSISTENT, "persistent", 5), (LOOPED, "looped", 7)]
)
def test_a_fused_step_moves_each_tensor_once(shape: Shape, rows: str, issued: int) -> None:
    found, _ = generate_step(each, [shape])
    ((section,),) = launched(found)
    assert (section.rows, section.count, section.width) == (rows, *shape)
    nbytes = 4 * prod(shape)
    assert (section.loaded, section.stored) == (3 * nbytes, 2 * nbytes)
    # A loop goes over the row again: over all that the mean is taken of.
    assert section.issued == issued * nbytes
    assert not found.temporaries
    assert not found.outputs
    assert not found.items


def test_16_bits_are_half_the_bytes() -> None:
    with device():
        found = generate(each, *step_on([PERSISTENT], torch.bfloat16))
    ((section,),) = launched(found)
    assert section.loaded + section.stored == 5 * 2 * prod(PERSISTENT)


def test_few_long_rows_are_cut_and_their_sums_are_a_temporary() -> None:
    found, _ = generate_step(each, [SPLIT])
    sums, means, update = (launch[0] for launch in launched(found))
    assert (sums.rows, sums.count, sums.width) == ("looped", 12, 6667)
    assert (means.rows, means.count, means.width) == ("persistent", 4, 3)
    assert update.rows == "none"
    assert sorted(found.temporaries.values()) == [4 * 4, 12 * 4]


def test_a_foreach_step_moves_more() -> None:
    shapes = [PERSISTENT, LOOPED]
    nbytes = 4 * sum(map(prod, shapes))
    fused, _ = generate_step(each, shapes)
    foreach, _ = generate_step(lists, shapes)
    passes = [
        total(section for launch in launched(found) for section in launch).moved / nbytes
        for found in (fused, foreach)
    ]
    assert passes[0] == 5
    # The decayed gradient is written, and read for its mean and for the update. The rows' means
    # are the rest.
    assert passes[1] == pytest.approx(9, abs=0.01)
    assert sum(foreach.temporaries.values()) > nbytes
    assert len(foreach.launches) == 4
    assert [len(launch) for launch in launched(foreach)] == [2, 1, 1, 2]


def test_a_combo_kernel_is_one_launch_of_several_sections() -> None:
    shapes = [(7, 300), (9, 200), (5, 100)]
    apart, _ = generate_step(each, shapes)
    combined, _ = generate_step(each, shapes, options=COMBO)
    assert [len(launch) for launch in launched(apart)] == [1, 1, 1]
    (launch,) = launched(combined)
    assert total(launch) == total(section for (section,) in launched(apart))


def test_operators_copies_and_items_are_told_apart() -> None:
    def function(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = x * scale
        return torch.mm(y, y), y.cpu()

    with device():
        found = generate(function, empty(16, 16), torch.empty(()))
    mm, copy = (call.name.rpartition(".")[2] for call in found.externs)
    assert (mm, copy) == ("mm", "copy_")
    assert found.items == 1
    assert len(found.launches) == 1
    assert [tensor.device.type for tensor in found.inputs] == ["cuda", "cpu"]


def test_every_graph_of_a_call_is_found_and_results_are_fake() -> None:
    def call() -> None:
        double, both = torch.compile(lambda x: 2 * x), torch.compile(lambda x, y: x @ y)
        with device():
            result = both(double(empty(8, 4)), empty(4, 6))
            assert (result.shape, result.device.type) == ((8, 6), "cuda")

    first, second = generated_by(call)
    assert (len(first.launches), len(first.externs)) == (1, 0)
    assert (len(second.launches), len(second.externs)) == (0, 1)


def test_sizes_that_are_no_numbers_are_refused() -> None:
    with device(), pytest.raises(RuntimeError, match="a size is not a number: empty_strided_cuda"):
        generate(lambda x: x + 1, empty(50, 40), dynamic=True)


def test_kernels_compile_for_an_h100_and_spill_nothing() -> None:
    found, _ = generate_step(each, SHAPES[:2])
    with fake_cuda():
        persistent, looped = (compiled(found.kernels[call.name]) for call in found.launches)
    for kernel in (persistent, looped):
        assert 0 < kernel.registers <= 255
        assert kernel.spilled == 0
        assert kernel.vector_loads == kernel.loads > 0


def test_a_row_of_odd_width_is_not_loaded_by_vectors() -> None:
    found, _ = generate_step(each, [(64, 577)])
    with fake_cuda():
        kernel = compiled(found.kernels[found.launches[0].name])
    assert kernel.vector_loads == 0


def test_nothing_of_the_device_stays() -> None:
    with device():
        empty(3)
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(3, device="cuda")


def test_where_there_can_be_none_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake.why_not() is None
    monkeypatch.setattr(fake, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is missing"), fake_cuda():
        pass
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(RuntimeError, match=r"torch is 2\.99\.0, .* of 2\.11 to 2\.14"), fake_cuda():
        pass
