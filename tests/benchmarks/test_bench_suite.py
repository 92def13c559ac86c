"""The benchmark suite: it catches what it is for, and its own arithmetic."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.curves import scaling
from benchmarks.gates import budgets, noise
from benchmarks.gates import test_ratios as ratios
from benchmarks.harness import measure
from benchmarks.harness.shapes import MODELS
from benchmarks.peers import train_step
from benchmarks.peers.algorithms import COMPARED, OURS

CASES = "(test_step and tiny_cnn and sgd-eager-gc]) or (test_packed_step and tiny_cnn-sgd)"
NAMES = ["step.tiny_cnn.eager.sgd.gc", "packed_step.tiny_cnn.sgd.gc"]


def suite(*options: str) -> subprocess.CompletedProcess[str]:
    return noise.suite("-k", CASES, "--seconds=0", "--device=cpu", *options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a first run, which nothing gates and nothing is compared with."""
    folder = tmp_path_factory.mktemp("saved")
    own = ["--benchmark-autosave", f"--benchmark-storage=file://{folder}"]
    done = suite(*own, "--ungated", "--benchmark-compare", "--benchmark-compare-fail=min:1%")
    assert done.returncode == 0, done.stdout
    assert "nothing is saved to compare with" in done.stdout
    assert "nothing was gated" in done.stdout
    assert all(f"| {name} |" in done.stdout for name in NAMES)
    return folder


@pytest.fixture
def set_budgets(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    def write(*, times: float) -> Path:
        """Budgets of the saved run, with more room than a busy machine needs."""
        monkeypatch.setattr(budgets, "FOLDER", tmp_path)
        monkeypatch.setattr(budgets, "MARGIN", times)
        monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["budgets", "--storage", str(saved)])
        budgets.main()
        return tmp_path / "cpu.toml"

    return write


def test_an_unchanged_step_passes(saved: Path, set_budgets: Callable[..., Path]) -> None:
    own = [f"--benchmark-storage=file://{saved}", "--benchmark-compare"]
    # A machine that is busy slows a step of microseconds tenfold.
    path = set_budgets(times=1000.0)
    done = suite(*own, "--benchmark-compare-fail=min:99900%", f"--budgets={path}")
    assert done.returncode == 0, done.stdout


def test_a_slowed_step_is_caught(saved: Path, set_budgets: Callable[..., Path]) -> None:
    """By its budget and by its history."""
    slowed = ("-p", "tests.benchmarks.slowed")
    own = [f"--benchmark-storage=file://{saved}", "--benchmark-compare", *slowed]
    histories = {name: ", ".join(budgets.history(name, "cpu", saved)) for name in NAMES}
    path = set_budgets(times=2.0)
    done = suite(*own, "--benchmark-compare-fail=min:100%", f"--budgets={path}")
    assert done.returncode != 0
    _, _, regressed = done.stdout.partition("Performance has regressed")
    assert "test_step[" in regressed
    assert "test_packed_step[" in regressed
    for name in NAMES:
        most = budgets.load(path)[name]
        (line,) = (x for x in done.stdout.splitlines() if x.startswith(f"{name}: "))
        ratio, said = line.removeprefix(f"{name}: ").split(" ", 1)
        assert said == f"is over its budget of {most:.3f}; history: {histories[name]}"
        assert float(ratio) > most


def test_a_case_without_a_budget_is_marked_and_fails_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cpu.toml"
    path.write_text(budgets.written({NAMES[0]: 1000.0}))
    done = suite(f"--budgets={path}")
    assert done.returncode == 0, done.stdout
    gated, ungated = (
        next(x for x in done.stdout.splitlines() if x.startswith(f"| {name} |")) for name in NAMES
    )
    assert "| 1000" in gated
    assert "| ungated |" in ungated
    assert f"Ungated: {NAMES[1]}." in done.stdout
    command = budgets.commands(["test_packed_step[cpu-tiny_cnn-sgd]"])
    assert f"To set what is lacking: {command}." in done.stdout


def test_budgets_that_do_not_exist() -> None:
    done = suite("--budgets=none.toml")
    assert done.returncode != 0
    assert "--budgets: there is no none.toml" in done.stdout


def test_verdict() -> None:
    assert budgets.verdict("a", 1.0, {"a": 1.0}, list) is None
    over = "a: 1.010 is over its budget of 1.000; history: "
    assert budgets.verdict("a", 1.01, {"a": 1.0}, list) == f"{over}none saved"
    assert budgets.verdict("a", 1.01, {"a": 1.0}, lambda: ["0.9", "1"]) == f"{over}0.9, 1"
    assert budgets.verdict("b", 9.0, {"a": 1.0}, list) is None


def run_file(folder: Path, number: int, ratio: float) -> Path:
    path = folder / "machine" / f"{number:04}_abc.json"
    path.parent.mkdir(exist_ok=True)
    info = {"case": "a", "device": "cpu", "ratio": ratio}
    others = [{"case": "b", "device": "cpu", "ratio": 9.0}, info | {"device": "cuda"}, {}]
    content = {
        "datetime": f"2026-01-{number:02}T00:00:00",
        "commit_info": {"id": "0123456789", "dirty": True},
        "benchmarks": [{"extra_info": each} for each in (info, *others)],
    }
    path.write_text(json.dumps(content))
    return path


def test_history_is_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure that was committed with the budget is in it once."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    earlier = {"datetime": "2025-12-31T00:00:00", "commit": "fedcba9", "case": "a", "ratio": 1.0}
    first = earlier | {"datetime": "2026-01-01T00:00:00", "commit": "0123456+", "ratio": 1.1}
    rows = [earlier, first, earlier | {"case": "b"}]
    (tmp_path / "budgets.json").write_text(json.dumps({"rows": rows}))
    for number, ratio in ((2, 1.2), (1, 1.1), (3, 1.3)):
        run_file(tmp_path, number, ratio)
    assert budgets.history("a", "cpu", tmp_path) == [
        "1.000 (2025-12-31, fedcba9)",
        "1.100 (2026-01-01, 0123456+)",
        "1.200 (2026-01-02, 0123456+)",
        "1.300 (2026-01-03, 0123456+)",
    ]


def test_budgets_are_rounded_up() -> None:
    found = {ratio: budgets.budget(ratio) for ratio in (0.08, 0.1, 1.0, 1.04, 3.33, 8.0, 9.0)}
    assert found == {
        0.08: 0.1,
        0.1: 0.125,
        1.0: 1.25,
        1.04: 1.3,
        3.33: 4.17,
        8.0: 10.0,
        9.0: 11.3,
    }


def test_budgets_are_read_as_written(tmp_path: Path) -> None:
    values = {"a.b.c.gc": 1.0, "a.b.c.gcc": 1.25, "a.b.d-e.gc": 2.0, "f.g.h": 0.5}
    path = tmp_path / "cpu.toml"
    path.write_text(budgets.written(values))
    assert budgets.load(path) == values
    assert "c = { gc = 1, gcc = 1.25 }" in path.read_text()


def cases() -> set[str]:
    """All that the suite measures."""
    convolutional = {m for m, shapes in MODELS.items() if max(map(len, shapes().values())) == 4}
    steps = itertools.product(MODELS, ratios.MODES, OURS, ratios.GC)
    ways = itertools.product(train_step.MODELS, ("sgd", "adamw"), ratios.WAYS)
    compiled = itertools.product(("sgd", "adamw"), ("packed", "unpacked"), ("cold", "warm"))
    hooked = itertools.product(("cnn", "resnet50", "mlp", "transformer"), ("eager", "compiled"))
    return {
        *(".".join(("step", *c)) for c in steps if c[-1] != "gcc" or c[0] in convolutional),
        *(".".join(("packed_step", *c, "gc")) for c in itertools.product(MODELS, COMPARED)),
        *(".".join(("packing", *c)) for c in itertools.product(MODELS, ("pack", "unpack"))),
        *(".".join(("hooks", *c)) for c in hooked),
        *(".".join(("train_step", *c)) for c in ways if c[-1] != "gcc" or c[0] == "cnn"),
        *(f"compilation.resnet50.{a}-{form}.{start}" for a, form, start in compiled),
    }


def test_every_budget_has_its_case() -> None:
    assert {*budgets.load(budgets.path("cpu"))} <= cases()


def test_every_case_has_a_budget() -> None:
    """Or is listed: nobody without the reference machine could set one."""
    if ungated := cases() - {*budgets.load(budgets.path("cpu"))}:
        pytest.skip(f"ungated: {', '.join(sorted(ungated))}; {budgets.commands(['...'])}")


def test_setting_budgets_of_some_cases_keeps_the_others(
    saved: Path, set_budgets: Callable[..., Path]
) -> None:
    path = set_budgets(times=3.0)
    path.write_text(budgets.written({"other.case.gc": 1.0, NAMES[0]: 0.05}))
    after = budgets.load(set_budgets(times=3.0))
    assert after["other.case.gc"] == 1.0
    assert after[NAMES[0]] > 0.05
    assert {*after} == {"other.case.gc", *NAMES}


def test_no_run_to_set_budgets_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["budgets", "--storage", str(tmp_path)])
    with pytest.raises(SystemExit):
        budgets.main()
    assert "make bench WHAT=save" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "least", "fails"), [(1.15, 1.1, False), (1.4, 1.0, True), (1.0, 1.3, True)]
)
def test_noise(
    ratio: float,
    least: float,
    fails: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = iter([(1.0, 1.0), (1.05, 1.05), (0.95, 1.0), (1.0, 1.0), (ratio, least)])
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(noise, "run", lambda *_: {"a": noise.Found(*next(runs))})
    monkeypatch.setattr(sys, "argv", ["noise", "--device", "cpu"])
    if fails:
        with pytest.raises(SystemExit, match=r"outside the margin of 1.25: a"):
            noise.main()
    else:
        noise.main()
    (row,) = json.loads((tmp_path / "noise.json").read_text())["rows"]
    assert row["spread"] == max(ratio, 1.05) / 0.95
    assert row["spread_of_least"] == max(least, 1.05)
    assert f"| a | 1.00 | 1.05 | 0.95 | 1.00 | {ratio:.2f} |" in capsys.readouterr().out


def test_an_accelerator_tells_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By events, the first of which is done before the call and the second after it."""
    log: list[str] = []

    class Event:
        now = 0.0

        def __init__(self, device: str, *, enable_timing: bool) -> None:
            assert (device, enable_timing) == ("cuda", True)

        def record(self) -> None:
            Event.now += 2.0
            self.at = Event.now
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    monkeypatch.setattr(torch, "Event", Event)
    clock = measure.EventClock("cuda")
    monkeypatch.setattr(measure, "clock", lambda device: clock)
    del log[:]
    assert measure.seconds(lambda: log.append("call"), "cuda") == pytest.approx(2e-3)
    assert log == ["record", "synchronize", "call", "record", "synchronize"]


def make(what: str) -> subprocess.CompletedProcess[str]:
    """What would be run."""
    command = ["make", "-n", "bench", f"WHAT={what}"]
    # Within `make test`, make would take itself for a part of that.
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(command, cwd=noise.ROOT, env=env, text=True, capture_output=True)


@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("ratios", " ".join(noise.SUITE[1:])),
        ("save", "--benchmark-autosave --ungated"),
        ("compare", "--benchmark-compare "),
        ("budgets", f"-m {budgets.__name__}"),
        ("noise", f"-m {noise.__name__}"),
        ("peers", "peers.speed "),
        ("scaling", f"-m {scaling.__name__}"),
    ],
)
def test_make_bench(what: str, command: str) -> None:
    *_, last = make(what).stdout.splitlines()
    assert command in last
    unknown = make(f"{what}s")
    assert unknown.returncode != 0
    assert f" {what}" in unknown.stderr.partition("there are only")[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_unchanged_run_stays_inside_the_margins(tmp_path: Path) -> None:
    """Five repetitions, as ``make bench WHAT=noise`` makes them; needs a quiet machine."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gates.noise",
        "-k",
        CASES,
        "--output",
        str(tmp_path / "noise"),
    ]
    done = subprocess.run(command, cwd=noise.ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
