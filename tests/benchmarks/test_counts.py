"""Graphs, kernels, bytes, allocations and collectives are the committed ones."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.gates import counts
from benchmarks.peers.algorithms import OURS
from gcfunc._tensors.versions import TORCH
from tests.processes import Processes


@pytest.fixture(scope="module")
def recorded() -> dict[str, counts.Counts]:
    found = counts.recorded()
    assert found is not None, counts.UPDATE
    return found


@pytest.mark.parametrize("case", counts.CASES)
def test_counts(case: str) -> None:
    assert not counts.differences(case, counts.CASES[case]())


@pytest.mark.parametrize("case", counts.TOGETHER)
def test_collectives(two: Processes, case: str) -> None:
    for found in two(counts.collectives, case):
        assert not counts.differences(case, found)


def test_nothing_else_is_recorded(recorded: dict[str, counts.Counts]) -> None:
    assert [*recorded] == [*counts.CASES, *counts.TOGETHER]


def without_hooks(case: str) -> counts.Counts:
    return counts.collectives(case, hooks=False)


@pytest.mark.parametrize("case", ["hooks-ddp", "hooks-register-ddp", "hooks-fsdp2"])
def test_hooks_communicate_nothing_more(
    two: Processes, recorded: dict[str, counts.Counts], case: str
) -> None:
    assert two(without_hooks, case) == [recorded[case]] * 2


def test_two_more_for_two_weights_cut_along_their_rows(
    two: Processes, recorded: dict[str, counts.Counts]
) -> None:
    case = "hooks-tensor-parallel"
    plain, _ = two(without_hooks, case)
    assert recorded[case] == {"all_reduce": plain["all_reduce"] + 2}


def buckets() -> int:
    """How many DDP has in the end."""
    seen: list[int] = []

    def hook(
        group: dist.ProcessGroup,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        seen.append(bucket.index())
        return allreduce_hook(group, bucket)

    model = counts.ddp(hooks=False)
    model.register_comm_hook(model.process_group, hook)
    for _ in range(3):
        seen.clear()
        model(torch.randn(4, 64)).sum().backward()
    return len(seen)


def test_ddp_communicates_once_a_bucket(two: Processes, recorded: dict[str, counts.Counts]) -> None:
    for case in ("hooks-ddp", "hooks-register-ddp"):
        assert recorded[case] == {"allreduce_": two(buckets)[0]}


def test_a_compiled_model_is_the_same_with_hooks(recorded: dict[str, counts.Counts]) -> None:
    assert counts.hooks_compiled(hooks=False) == recorded["hooks-compiled"]


@pytest.mark.parametrize("algorithm", OURS)
def test_centralizing_shows(recorded: dict[str, counts.Counts], algorithm: str) -> None:
    """In loops, and the means of six weights, of four if of convolutions only."""
    plain, gc, gcc = (recorded[f"{algorithm}-{gc}-donated"] for gc in ("plain", "gc", "gcc"))
    assert plain["kernels"] < gcc["kernels"] < gc["kernels"]
    assert gcc["allocations"] - plain["allocations"] >= 4
    assert gc["allocations"] - plain["allocations"] >= 6


@pytest.mark.parametrize("algorithm", counts.FORMS)
def test_forms(recorded: dict[str, counts.Counts], algorithm: str) -> None:
    donated, packed, pure, drop_in = (
        recorded[f"{algorithm}-gc-{form}"] for form in ("donated", "packed", "pure", "drop-in")
    )
    for quantity in ("kernels", "bytes"):
        assert drop_in[quantity] == donated[quantity]
    assert packed["kernels"] < donated["kernels"]
    # A pure step writes params and slots anew, which takes two of five passes, or three of seven.
    assert pure["allocated_bytes"] > pure["bytes_least"] * 2 / 5 > 50 * donated["allocated_bytes"]


def test_no_kernel_can_do_with_less(recorded: dict[str, counts.Counts]) -> None:
    steps = [found for found in recorded.values() if "bytes_least" in found]
    assert steps
    assert all(found["bytes"] >= found["bytes_least"] for found in steps)


def test_layers_that_are_alike_share_a_graph(recorded: dict[str, counts.Counts]) -> None:
    found = recorded["sgd-gc-24-layers"]
    assert found["graphs"] == found["cache_entries"] == 1
    # What torch 2.11 lacks to call graphs without Dynamo: there is one for all layers.
    assert found["calls"] > 1 or TORCH < (2, 12)
