"""What the gate on counts is for does not get through it."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gcfunc
from benchmarks.gates import counts
from tests.benchmarks import faults
from tests.processes import Processes

Run = Callable[[], counts.Counts]
RUNS: dict[str, Run] = {
    "sgd": partial(counts.functional, "sgd", "gc", model=partial(counts.mlp, 1)),
    "adamw": partial(counts.functional, "adamw", "gc", model=partial(counts.mlp, 1)),
}


@pytest.fixture(scope="module")
def found() -> dict[str, counts.Counts]:
    """Without anything wrong."""
    return {case: run() for case, run in RUNS.items()}


@pytest.fixture(autouse=True)
def _expected(
    found: dict[str, counts.Counts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "CASES", RUNS)
    monkeypatch.setattr(counts, "TOGETHER", {})
    monkeypatch.setattr(counts, "EXPECTED", tmp_path / "expected" / "torch-2.14.1.json")
    counts.record(found)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def main(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["counts", *args])
        counts.main()

    return main


def differing(case: str, found: counts.Counts) -> set[str]:
    lines = counts.differences(case, found)
    assert all(line.startswith(f"{case}: ") and "`make counts`" in line for line in lines)
    return {line.split(": ")[1] for line in lines}


def test_nothing_differs_from_itself() -> None:
    assert not differing("sgd", RUNS["sgd"]())


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("quantity", ["graphs", "kernels", "bytes", "allocations"])
def test_better_fails_like_worse(found: dict[str, counts.Counts], quantity: str, by: int) -> None:
    expected = found["sgd"][quantity]
    [line] = counts.differences("sgd", found["sgd"] | {quantity: expected + by})
    assert line.startswith(f"sgd: {quantity}: expected {expected}, found {expected + by}; ")
    assert "`make counts`, or python -m benchmarks.gates.counts --update" in line


def test_quantities_that_are_new_or_gone(found: dict[str, counts.Counts]) -> None:
    sgd = dict(found["sgd"])
    sgd["new"] = sgd.pop("kernels")
    assert differing("sgd", sgd) == {"kernels", "new"}


def test_a_graph_break(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    faults.graph_break(monkeypatch)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break") as raised:
        run("--cases", "sgd")
    assert raised.value.__notes__ == ["in case sgd"]


class Break(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of Dynamo's, at the break
def test_a_graph_break_with_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(*between: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 108), *between, nn.Linear(108, 10))

    monkeypatch.setattr(counts, "cnn", linear)
    counts.record({"sgd": counts.hooks_compiled()})
    monkeypatch.setattr(counts, "cnn", lambda: linear(Break()))
    broken = counts.hooks_compiled()
    assert broken["graph_breaks"] > 0
    assert {"graphs", "graph_breaks"} <= differing("sgd", broken)


def test_a_learning_rate_that_is_a_number() -> None:
    lr = 0.1
    params, grads = torch.randn(4, 4), torch.randn(4, 4)

    @torch.compile
    def step(lr: float) -> Tensor:
        return params - lr * gcfunc.centralize(grads)

    def change(t: int) -> None:
        nonlocal lr
        lr = 0.1 / (t + 1)

    numbers = counts.count(counts.Stepping(change, lambda: step(lr)))
    assert numbers["recompiles"] >= 1
    assert numbers["cache_entries"] == 1 + numbers["recompiles"]
    assert {"recompiles", "cache_entries"} <= differing("sgd", numbers)


def test_gradients_in_another_layout() -> None:
    """Held by a donated step, of which Dynamo knows nothing."""
    opt = gcfunc.compile(gcfunc.sgd(0.1, 0.9, gc="gc"))
    params = {"w": torch.randn(8, 8)}
    grads, state = params, opt.init(params)

    def change(t: int) -> None:
        nonlocal grads
        g = torch.randn(8, 8)
        grads = {"w": g.t() if t % 2 else g}

    stepping = counts.Stepping(change, lambda: opt.step(params, grads, state), opt)
    turned = counts.count(stepping)
    assert (turned["graphs"], turned["recompiles"], turned["cache_entries"]) == (1, 1, 2)
    assert {"recompiles", "cache_entries"} <= differing("sgd", turned)


def test_what_is_written_and_read_again(
    found: dict[str, counts.Counts], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.written_and_read_again(monkeypatch)
    more = RUNS["adamw"]()
    assert {"kernels", "bytes"} <= differing("adamw", more)
    assert all(more[name] > found["adamw"][name] for name in ("kernels", "bytes"))


def test_an_allocation(found: dict[str, counts.Counts], monkeypatch: pytest.MonkeyPatch) -> None:
    faults.allocation(monkeypatch)
    more = RUNS["sgd"]()
    assert differing("sgd", more) == {"allocations", "allocated_bytes"}
    assert more["allocations"] == found["sgd"]["allocations"] + 1
    assert more["allocated_bytes"] == found["sgd"]["allocated_bytes"] + 40


def all_reducing(case: str) -> counts.Counts:
    with pytest.MonkeyPatch.context() as patch:
        faults.all_reduce(patch)
        return counts.collectives(case)


def test_an_all_reduce(two: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = "hooks-ddp"
    expected = two(counts.collectives, case)[0]["allreduce_"]
    for more in two(all_reducing, case):
        assert more == {"allreduce_": expected + 4}
        assert differing(case, more) == {"allreduce_"}


def test_nothing_recorded(run: Callable[..., None], found: dict[str, counts.Counts]) -> None:
    counts.EXPECTED.unlink()
    with pytest.raises(SystemExit, match=rf"^no counts .* for torch {counts.VERSION}; `make coun"):
        run()
    counts.record({"adamw": found["adamw"]})
    assert counts.differences("sgd", found["sgd"])[0].startswith("sgd: not recorded; `make counts`")


def test_another_patch_of_the_same_version_serves(
    found: dict[str, counts.Counts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "EXPECTED", counts.EXPECTED.with_name("torch-2.14.0.json"))
    assert counts.differences("sgd", found["sgd"]) == []
    assert counts.differences("sgd", found["adamw"]) != []
    monkeypatch.setattr(counts, "EXPECTED", counts.EXPECTED.with_name("torch-2.1.0.json"))
    assert counts.differences("sgd", found["sgd"])[0].startswith("no counts are recorded")


def test_the_command(
    run: Callable[..., None],
    found: dict[str, counts.Counts],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    better = found["sgd"] | {"kernels": 1}
    monkeypatch.setattr(counts, "CASES", {"sgd": lambda: better, "new": lambda: {"graphs": 7}})
    with pytest.raises(SystemExit, match=r"sgd: kernels: .*\nnew: not recorded"):
        run()
    run("--update", "--cases", "sgd")
    assert counts.recorded() == {"sgd": better}  # adamw is no case any more
    run("--cases", "sgd")
    run("--update")
    assert counts.recorded() == {"sgd": better, "new": {"graphs": 7}}
    table = capsys.readouterr().out
    ratio = better["bytes"] / better["bytes_least"]
    assert f"| {better['bytes_least']} | {ratio:.3f} |" in table
    assert "| case | graphs |\n| --- | --- |\n| new | 7 |" in table


def test_the_command_with_two_processes(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    run("--cases", "hooks-ddp")
