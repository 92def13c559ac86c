"""What awaits a GPU is rehearsed on the CPU: tests, figures, and the command that runs both."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as figures
from benchmarks.gpu import day, launches, steps, training
from benchmarks.harness import measure
from benchmarks.harness.shapes import MODELS
from benchmarks.peers.candidates import FUSED

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Within `make test`, make would take itself for a part of that.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command, cwd=day.ROOT, env=env | environment, text=True, capture_output=True
    )


def rehearsed(only: str, *options: str) -> str:
    command = ("-m", "pytest", "-c", "tests/gpu/pytest.ini", "tests/gpu", "-q", "-k", only)
    done = run(sys.executable, *command, *options, **NO_GPU)
    return done.stdout + done.stderr


def test_the_tests_are_rehearsed() -> None:
    """One that compiles, and of those that need not some of each kind."""
    compiled = "test_packed and sgd and not sgdw"
    eager = "not_compiled and lion or hooks and Net and by_backward"
    output = rehearsed(f"{eager} or {compiled}", "--rehearse")
    assert " passed" in output, output
    assert not {"failed", "skipped", "error"} & {*output.split()}, output


def test_what_would_begin_too_late_fails() -> None:
    output = rehearsed("not_compiled and lion", "--rehearse", "--seconds=-1")
    assert "left out, as it would begin after -1 s" in output, output


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that need not compile much."""
    wanted = (FUSED, "gcfunc packed", steps.FOREACH)
    monkeypatch.setattr(steps, "ORDER", ((("sgd", "adagrad"), wanted),))
    first = dict([*training.CANDIDATES.items()][:1])
    monkeypatch.setattr(training, "CANDIDATES", first)


def main(monkeypatch: pytest.MonkeyPatch, *options: str) -> str | None:
    own = ["gpu", "--models", "tiny_cnn", "--algorithms", "sgd", "--each=0", *options]
    monkeypatch.setattr(sys, "argv", own)
    return figures.main()


@pytest.mark.usefixtures("fresh_compiler", "few")
def test_the_figures_are_rehearsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "write", pytest.fail)
    assert main(monkeypatch, "--rehearse") is None
    _, table = capsys.readouterr().out.split("\n\n")
    head, _, *lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    assert head == [*figures.HEAD]
    assert [line[2] for line in lines] == [
        *(case.candidate for case in steps.cases(["tiny_cnn"], ["sgd"])),
        *training.CANDIDATES,
    ]
    for line in lines:
        said = dict(zip(head, line, strict=True))
        assert said["ratio"].endswith("]"), line
        assert int(said["launches"]) > 0
    assert lines[-1][head.index("graphs replayed, skipped")]


@pytest.mark.usefixtures("few")
def test_what_is_left_out_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "CANDIDATES", {})
    failure = main(monkeypatch, "--rehearse", "--seconds=0")
    assert failure == "of gcfunc itself, 1 failed or were left out"
    assert capsys.readouterr().out.count("left out, as the time is spent") == 6


def test_figures_are_kept_under_the_name_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4 (80GB)")
    assert figures.path() == measure.RESULTS / "cuda-nvidia-a100-sxm4-80gb.json"


def test_each_case_comes_once() -> None:
    found = [*steps.cases([*MODELS], ["sgd", "adamw", "adagrad"])]
    assert len(found) == len({*found})
    assert {case.model for case in found} == {*MODELS}


def test_a_step_that_cannot_be_profiled_is_measured_all_the_same() -> None:
    def step() -> None:
        raise RuntimeError("no counters here")

    assert launches.of(step, "cpu") == {
        "launches": None,
        "unprofiled": "RuntimeError: no counters here",
    }


def test_where_torch_has_no_fused_step_foreach_stands_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: Any) -> None:
        raise RuntimeError("`fused=True` requires ...")

    params, grads = ({"w": torch.ones(2, 2)} for _ in range(2))
    assert steps.fastest("sgd", params, grads)[0] == FUSED
    monkeypatch.setattr(steps, "fastest_torch", refuses)
    assert steps.fastest("sgd", params, grads)[0] == steps.FOREACH


def test_the_command_says_where_there_is_no_gpu() -> None:
    done = run(sys.executable, "-m", "benchmarks.gpu.day", **NO_GPU)
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert sys.executable in done.stderr


def test_make_takes_what_is_there() -> None:
    done = run("make", "-n", "gpu", "VENV=nowhere", "PYTHON=given", "OPTIONS=--rehearse")
    assert done.stdout.split() == ["given", "-m", "benchmarks.gpu.day", "--rehearse"]


def test_what_is_missing_is_named_and_gone_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(name: str, *_: object) -> list[str]:
        ran.append(name)
        return []

    monkeypatch.setattr(day, "find_spec", lambda name: name != "pytest" and find_spec(name))
    monkeypatch.setattr(day, "run", run)
    monkeypatch.setattr(sys, "argv", ["day", "--rehearse"])
    with pytest.raises(SystemExit, match="tests: left out"):
        day.main()
    assert "pytest is missing: the tests are left out" in capsys.readouterr().out
    assert ran == ["figures"]


def test_gcfunc_need_not_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    with day.installed() as environment:
        assert environment.get("PYTHONPATH") == os.environ.get("PYTHONPATH")
    monkeypatch.setattr(day, "version", unknown)
    with day.installed() as environment:
        code = "import importlib.metadata as m; print(m.version('gcfunc'))"
        # Without site-packages, where it is installed.
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.split() == [b"0"], done.stderr
