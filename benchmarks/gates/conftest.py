"""The gate that every benchmark passes through, and its options."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import get_machine_id

from benchmarks.gates import budgets
from benchmarks.harness import footprint, measure

Call = Callable[[], object]
FEWEST, MOST = 7, 500
"""Rounds of each case."""
UNGATED = "ungated"
"""Instead of a budget."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gcfunc")
    group.addoption("--device", default=measure.device(), help="where to measure")
    group.addoption("--seconds", type=float, default=2.0, help="to measure each case for")
    group.addoption("--budgets", type=Path, help="instead of benchmarks/budgets/DEVICE.toml")
    group.addoption("--ungated", action="store_true", help="whatever the budgets are")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("budgets")) and not path.exists():
        raise pytest.UsageError(f"--budgets: there is no {path}")
    footprint.keep_memory()
    # Before pytest-benchmark asks: without history it would fail after everything was measured.
    if config.getoption("benchmark_compare") and not saved_here(config):
        config.option.benchmark_compare, config.option.benchmark_compare_fail = None, []
        config.issue_config_time_warning(
            pytest.PytestWarning("nothing is saved to compare with; --benchmark-autosave saves"), 1
        )


def saved_here(config: pytest.Config) -> list[Path]:
    """The runs that pytest-benchmark knows; it compares with the last."""
    machine: str = get_machine_id()  # type: ignore[no-untyped-call]
    return sorted((storage(config) / machine).glob("[0-9]*.json"))


def storage(config: pytest.Config) -> Path:
    """Where runs are saved."""
    return Path(config.getoption("benchmark_storage").removeprefix("file://"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # As a parameter, so that saved runs on different devices are never compared.
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [metafunc.config.getoption("device")])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    clock = measure.clock(config.getoption("device"))
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


class Gate(Protocol):
    """Measures a case, and fails if it is over its budget, should it have one."""

    def __call__(
        self,
        name: str,
        call: Call,
        baseline: Call,
        to: str,
        *,
        setup: Call | None = None,
        teardown: Call | None = None,
        baseline_setup: Call | None = None,
        rounds: int | None = None,
    ) -> None:
        """Time two calls in turn.

        Args:
            name: The case, as the file of budgets has it.
            call: What is measured.
            baseline: What it is measured against.
            to: The baseline's name.
            setup: Called before each call.
            teardown: Called after it.
            baseline_setup: Called before each call of the baseline.
            rounds: How many; as many as the seconds allow if it is not given.
        """


@pytest.fixture(scope="session")
def allowed(pytestconfig: pytest.Config) -> dict[str, float]:
    path = pytestconfig.getoption("budgets") or budgets.path(pytestconfig.getoption("device"))
    if not pytestconfig.getoption("ungated") and path.exists():
        return budgets.load(path)
    return {}


@pytest.fixture
def gate(
    benchmark: BenchmarkFixture,
    allowed: dict[str, float],
    device: str,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> Iterator[Gate]:
    def measured(
        name: str,
        call: Call,
        baseline: Call,
        to: str,
        *,
        setup: Call | None = None,
        teardown: Call | None = None,
        baseline_setup: Call | None = None,
        rounds: int | None = None,
    ) -> None:
        theirs: list[float] = []

        def before() -> None:
            if baseline_setup is not None:
                baseline_setup()
            theirs.append(measure.seconds(baseline, device))
            if setup is not None:
                setup()

        warm_ups = 0
        if rounds is None:
            warm_ups = 2
            budget = pytestconfig.getoption("seconds")
            rounds = min(MOST, max(FEWEST, int(budget / _round(before, call, teardown, device))))
        benchmark.group = name.partition(".")[0]
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            call,
            setup=before,
            teardown=teardown,
            rounds=rounds,
            warmup_rounds=warm_ups,
        )
        if benchmark.stats is None:
            pytest.fail("pytest-benchmark is disabled, by pytest-xdist perhaps", pytrace=False)
        found = measure.ratio(benchmark.stats.stats.data, theirs[-rounds:])
        case = {"case": name, "device": device, "to": to, "torch": torch.__version__}
        benchmark.extra_info |= case | found._asdict()
        most = allowed.get(name, UNGATED)
        quartiles = f"{found.low:.2f} to {found.high:.2f}"
        line = [name, f"{found.ratio:.2f}", quartiles, most, f"{1e3 * found.seconds:.2f} ms", to]
        record_property("ratio", line)
        earlier = partial(budgets.history, name, device, storage(pytestconfig))
        if wrong := budgets.verdict(name, found.ratio, allowed, earlier):
            pytest.fail(wrong, pytrace=False)

    yield measured
    torch.compiler.reset()
    gc.collect()


def _round(before: Call, call: Call, teardown: Call | None, device: str) -> float:
    """Seconds of a round, once everything is compiled."""

    def whole() -> None:
        before()
        call()
        if teardown is not None:
            teardown()

    whole()
    return min(measure.seconds(whole, device) for _ in range(3))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    found = {report.head_line: dict(report.user_properties).get("ratio") for report in reports}
    by_test = {test: line for test, line in found.items() if isinstance(line, list)}
    if not (lines := [*by_test.values()]):
        return
    terminalreporter.section("ratios of medians")
    head = ["case", "ratio", "quartiles", "budget", "time", "to"]
    terminalreporter.write_line(measure.table(head, lines))
    if ungated := {test: line[0] for test, line in by_test.items() if line[3] == UNGATED}:
        some = len(ungated) < len(lines)
        which = f"Ungated: {', '.join(ungated.values())}."
        terminalreporter.write_line(which if some else "No case has a budget: nothing was gated.")
        if not config.getoption("ungated"):
            commands = budgets.commands([*ungated] if some else ())
            terminalreporter.write_line(f"To set what is lacking: {commands}.")
    if config.getoption("benchmark_compare"):
        device = config.getoption("device")
        *_, last = saved_here(config)
        known = {
            case["case"]
            for case in budgets.saved(storage(config), last.stem)
            if case["device"] == device
        }
        if new := [line[0] for line in lines if line[0] not in known]:
            terminalreporter.write_line(f"Not compared, {last.stem} lacks them: {', '.join(new)}.")
