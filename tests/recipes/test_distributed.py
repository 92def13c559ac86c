"""``gcfunc train`` in several processes, started by torchrun.

As a module of its own, it is what torchrun starts.
"""

import faulthandler
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gcfunc.recipes.cli import main
from gcfunc.recipes.train import Run, Trainer
from tests.recipes.command import results, same, train, untimed, weights

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

# Batches of 16, 16, 16 and 1: shares are uneven, and in the last most processes have none.
OPTIONS = ("--dataset", "digits", "--limit", "49", "--epochs", "2", "--batch-size", "16")
STEPS = 4  # of an epoch
TIMEOUT = 90.0

HAPPENS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: signal.raise_signal(signal.SIGTERM),
    "raise": lambda: torch.ones(1).view(2),
}


@contextmanager
def torchrun(size: int, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """``size`` processes that run ``gcfunc`` with these arguments.

    Or this module with them, ``(rank, step, what, *arguments)``: what happens to one after a step.
    """
    module = "gcfunc" if arguments[0] == "train" else "tests.recipes.test_distributed"
    # The loopback interface: lo on Linux, lo0 on macOS.
    interfaces = [name for _, name in socket.if_nameindex()]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(size), "-m", module, *arguments),
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if "lo" in interfaces else "lo0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its processes, by force after half a minute
            process.communicate(timeout=60)


def outcome(size: int, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and what was said on stderr."""
    with torchrun(size, *arguments) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def errors(err: str) -> list[str]:
    return re.findall(r"^gcfunc: error: .*$", err, re.MULTILINE)


Whole = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, *OPTIONS, "--mode", "hooks")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What several make of it when nothing happens to them."""

    @cache
    def train(parallel: str, size: int) -> Path:
        folder = tmp_path_factory.mktemp(parallel)
        arguments = ("train", *OPTIONS, f"--{parallel}", "--out", str(folder))
        status, out, err = outcome(size, *arguments)
        assert status == 0, err
        assert "Warning" not in err
        assert out.count("scikit-learn's 8x8 digits") == 1  # one of them prints
        return folder

    return train


# Three for DDP: the order in which more than two gradients are added depends on their layout.
THREE = pytest.param("ddp", 3, marks=pytest.mark.slow)


@pytest.mark.parametrize(("parallel", "size"), [("ddp", 2), ("fsdp", 2), THREE])
def test_several_learn_what_one_does(whole: Whole, alone: Path, parallel: str, size: int) -> None:
    folder = whole(parallel, size)
    assert results(folder)["processes"] == size
    assert results(folder)["config"][parallel] is True
    for one, other in zip(*(untimed(results(f))["runs"] for f in (folder, alone)), strict=True):
        for here, there in zip(one["history"], other["history"], strict=True):
            assert here == pytest.approx(there, rel=1e-5)
    torch.testing.assert_close(
        weights(folder, "gc-seed0"), weights(alone, "gc-seed0"), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("parallel", "size"), [("ddp", 2), pytest.param("fsdp", 2, marks=pytest.mark.slow), THREE]
)
def test_all_stop_where_one_is_told_to(
    tmp_path: Path, whole: Whole, alone: Path, parallel: str, size: int
) -> None:
    """Amid an epoch, and it is not the first; going on from there is exact."""
    arguments = ("train", *OPTIONS, f"--{parallel}", "--out", str(tmp_path))
    _, out, err = outcome(size, "1", str(STEPS + 2), "terminate", *arguments)
    assert errors(err) == []
    assert f"--nproc-per-node {size} -m gcfunc train --resume {tmp_path}" in out
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["current"]
    assert (saved["epoch"], saved["batch"]) == (1, 2)
    shapes = {name: p.shape for name, p in weights(alone, "gc-seed0").items()}
    assert {name: p.shape for name, p in saved["params"].items()} == shapes
    goes_on_to(whole(parallel, size), tmp_path, size)


@pytest.mark.parametrize(
    ("parallel", "rank", "what"),
    [
        ("fsdp", 0, "kill"),
        ("ddp", 1, "raise"),
        pytest.param("ddp", 1, "kill", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_ends_the_run(
    tmp_path: Path, whole: Whole, parallel: str, rank: int, what: str
) -> None:
    """The other says so, and the last epoch's checkpoint goes on to the same end."""
    arguments = ("train", *OPTIONS, f"--{parallel}", "--out", str(tmp_path))
    began = time.monotonic()
    status, _, err = outcome(2, str(rank), str(STEPS + 2), what, *arguments)
    assert time.monotonic() - began < 60  # none waits for what never comes
    assert status == 1
    (said,) = errors(err)
    assert f"process {1 - rank} of 2 stops, as another one died" in said
    assert f"--nproc-per-node 2 -m gcfunc train --resume {tmp_path}" in said
    assert ("shape '[2]' is invalid" in err) == (what == "raise")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["current"]
    assert (saved["epoch"], saved["batch"]) == (1, 0)
    if what == "kill":
        goes_on_to(whole(parallel, 2), tmp_path, 2)


def goes_on_to(end: Path, folder: Path, size: int) -> None:
    status, _, err = outcome(size, "train", "--resume", str(folder))
    assert status == 0, err
    assert untimed(results(folder)) == untimed(results(end))
    assert same(weights(folder, "gc-seed0"), weights(end, "gc-seed0"))


@pytest.mark.slow
def test_a_process_that_dies_before_there_is_a_checkpoint(tmp_path: Path) -> None:
    arguments = ("train", *OPTIONS, "--ddp", "--out", str(tmp_path))
    _, _, err = outcome(2, "1", "1", "kill", *arguments)
    (said,) = errors(err)
    assert "no epoch was finished, so that nothing was saved" in said


def test_torchrun_is_told_to_stop(tmp_path: Path) -> None:
    options = ("--fsdp", "--epochs", "1000000", "--out", str(tmp_path))
    with torchrun(2, "train", *OPTIONS, *options) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=25)  # before torchrun kills them
    assert f"--nproc-per-node 2 -m gcfunc train --resume {tmp_path}" in out
    assert errors(err) == []
    assert err.count("Stopping after this step") == 1
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["current"]
    assert saved["epoch"] * STEPS + saved["batch"] >= STEPS


@pytest.mark.slow
def test_processes_that_would_do_the_same_are_refused(tmp_path: Path) -> None:
    status, _, err = outcome(2, "train", *OPTIONS, "--out", str(tmp_path / "out"))
    assert status == 1
    (said,) = errors(err)
    assert said.endswith("started as 2 processes, which train together only with --ddp or --fsdp")
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    # Should all else fail, nothing stays behind.
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    rank, step, what, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        advance, count = Trainer.advance, iter(range(1, int(step) + 1))

        def counted(self: Trainer, run: Run) -> None:
            advance(self, run)
            if next(count, None) == int(step):
                HAPPENS[what]()

        Trainer.advance = counted  # type: ignore[method-assign]
    sys.exit(main(arguments))
