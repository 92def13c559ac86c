"""What gcfunc is compared with computes what it should, and what fails is reported."""

import itertools
import json
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gcfunc
from benchmarks.harness import attempts, measure
from benchmarks.peers import speed
from benchmarks.peers.algorithms import COMPARED, OURS
from benchmarks.peers.candidates import CANDIDATES
from benchmarks.peers.steps import Peer
from benchmarks.tables import figures
from tests.cases import Params, largest_difference, make_params, random_like

STEPS = 4
NAMES = [name for name in CANDIDATES if not name.startswith("gcfunc")]
LACKING = [("pytorch_optimizer", "adagrad"), ("optimi, no GC", "adagrad")]
CASES = [case for case in itertools.product(NAMES, COMPARED) if case not in LACKING]
CENTRALIZES_DECAY = ("optax", "reference loop")
TOLERANCES = {("pytorch_optimizer", "adamw"): 1e-5}
"""Other than 1e-6, in float32 on params of size 1: AdamP has eps elsewhere, which shows where
gradients are nearly 0."""


def moved(candidate: str, algorithm: str) -> Params:
    """The params after some steps with the same gradients, which some peers overwrite."""
    params = make_params(torch.float32)
    grads = random_like(params, 0)
    peer = CANDIDATES[candidate](algorithm, params, grads)
    for _ in range(STEPS):
        peer.step()
        for name, p in peer.params.items():
            if isinstance(p, torch.Tensor) and p.grad is not None:
                p.grad.copy_(grads[name])
    return {
        name: p.clone() if isinstance(p, torch.Tensor) else torch.from_numpy(np.array(p))
        for name, p in peer.params.items()
    }


def expected(algorithm: str, *, before: bool, gc: str | None) -> Params:
    """The same by gcfunc, with the gradients centralized in the step or before it."""
    params = make_params(torch.float32)
    grads = random_like(params, 0)
    opt = OURS[algorithm](None if before else gc)
    state = opt.init(params)
    for _ in range(STEPS):
        centralized = gcfunc.centralize(grads) if before and gc else grads
        params, state = opt.step(params, centralized, state)
    return params


def without_warnings(candidate: str, algorithm: str) -> Params:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return moved(candidate, algorithm)


@pytest.fixture(scope="module")
def aside() -> Iterator[ProcessPoolExecutor]:
    """A process for JAX: where it has run, any fork warns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("candidate", "algorithm"), CASES)
def test_values(candidate: str, algorithm: str, aside: ProcessPoolExecutor) -> None:
    if candidate == "optax":
        found = aside.submit(without_warnings, candidate, algorithm).result()
    else:
        found = moved(candidate, algorithm)
    gc = None if candidate.endswith("no GC") else "gc"
    same = expected(algorithm, before=candidate not in CENTRALIZES_DECAY, gc=gc)
    assert largest_difference(found, same) < TOLERANCES.get((candidate, algorithm), 1e-6)
    other = expected(algorithm, before=False, gc=None if gc else "gc")
    assert largest_difference(found, other) > 1e-3
    # What it makes to centralize the decay of SGD, too, is much less than that.
    assert largest_difference(found, expected(algorithm, before=False, gc=gc)) < 1e-4


@pytest.mark.parametrize(("candidate", "algorithm"), LACKING)
def test_what_a_library_lacks(candidate: str, algorithm: str) -> None:
    with pytest.raises(LookupError, match=f"has no {algorithm}"):
        moved(candidate, algorithm)


def test_jax_gives_up_what_it_was_given(aside: ProcessPoolExecutor) -> None:
    assert aside.submit(donated).result()


def donated() -> bool:
    params = make_params(torch.float32)
    peer = CANDIDATES["optax"]("sgd", params, random_like(params, 0))
    before = [*peer.params.values()]
    peer.step()
    return all(p.is_deleted() for p in before)


def unbuilt(*_: object) -> Peer:
    raise ValueError("no | such thing\nand more")


def unstepped(*_: object) -> Peer:
    def step() -> None:
        raise RuntimeError("backend raised:\n\n  what it raised\nmore")

    return Peer(step, {})


def endless(*_: object) -> Peer:
    def step() -> None:
        while True:
            pass

    return Peer(step, {})


FAILING = {
    "unbuilt": (unbuilt, "ValueError: no | such thing"),
    "unstepped": (unstepped, "RuntimeError: backend raised: what it raised"),
    "endless": (endless, "TookTooLong: more than 8 s"),
}


def test_failures_are_reported_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    for name, (make, _) in FAILING.items():
        monkeypatch.setitem(CANDIDATES, name, make)
    monkeypatch.setitem(sys.modules, "optimi", None)
    own = ["--models", "tiny_cnn", "--algorithms", "sgd", "--seconds", "0", "--limit", "8"]
    asked = [*FAILING, "optimi, no GC", "reference loop"]
    monkeypatch.setattr(sys, "argv", ["speed", *own, "--device", "cpu", "--candidates", *asked])
    speed.main()
    *failed, last = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert last["ratio"] > 0
    errors = [error for _, error in FAILING.values()]
    errors.append("ModuleNotFoundError: import of optimi halted; None in sys.modules")
    assert [row.get("error") for row in failed] == errors
    assert not any("ratio" in row for row in failed)
    table = capsys.readouterr().out
    assert all(f"| failed: {error} |".replace("no |", r"no \|") in table for error in errors)


def test_the_limit_is_gone_after_it() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with attempts.limit(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    with pytest.raises(attempts.TookTooLong), attempts.limit(0.01):
        endless().step()
    assert signal.getsignal(signal.SIGALRM) is before


def test_errors_without_words() -> None:
    assert attempts.described(KeyError()) == "KeyError"


def test_the_readme_says_what_was_measured() -> None:
    text = figures.README.read_text(encoding="utf-8")
    assert {block[2] for block in figures.BLOCK.finditer(text)} == {*figures.TABLES}
    assert figures.rendered(text) == text, "run python -m benchmarks.tables.figures"


def row(candidate: str, algorithm: str, found: float | str) -> dict[str, Any]:
    names = {"model": "tiny_cnn", "algorithm": algorithm, "candidate": candidate}
    if isinstance(found, str):
        return names | {"error": found}
    return names | measure.Ratio(found, found, found, found / 1e3, 1e-3)._asdict()


MACHINE = {"cores": 2, "device": "CPU", "vector_instructions": "AVX2", "torch": "2"}
PARTIAL = {
    "command": "python -m benchmarks.peers.speed",
    "machine": MACHINE,
    "rows": [
        row("gcfunc", "sgd", 0.5),
        row("optax", "adamw", "ImportError: no jax"),
        row("a candidate of another time", "sgd", 3.0),
    ],
}


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that is filled from results that are mostly missing."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    (tmp_path / "speed.json").write_text(json.dumps(PARTIAL))
    path = tmp_path / "README.md"
    blocks = "".join(f"<!-- figures: {name} -->\n<!-- /figures -->\n" for name in figures.TABLES)
    path.write_text(f"before\n{blocks}after\n")
    monkeypatch.setattr(figures, "README", path)
    return path


def test_figures_of_a_part(readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["figures"])
    figures.main()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| SGD · AdamW | a tiny CNN, 161 tensors, 0.2 M |" in text
    assert "| torch fused, no GC, in ms | 1.0 · not run |" in text
    assert "| gcfunc | **0.50** · not run |" in text
    assert "| optax on JAX | not run · failed |" in text
    assert "Failed: optax on JAX, AdamW: `ImportError: no jax`." in text
    assert "another time" not in text
    assert (readme.parent / "speed.png").stat().st_size > 10_000


def test_check(readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["figures", "--check"])
    before = readme.read_text()
    with pytest.raises(SystemExit, match=r"run python -m benchmarks\.tables\.figures"):
        figures.main()
    assert readme.read_text() == before
    readme.write_text(figures.rendered(before))
    figures.main()


def test_figures_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    for table in figures.TABLES.values():
        assert table().startswith("| ")
    figures.chart(tmp_path / "chart.png")
