"""A pytest plugin under which centralization takes much longer."""

import pytest

from tests.benchmarks.faults import slow_centralization


@pytest.fixture(autouse=True)
def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_centralization(monkeypatch)
