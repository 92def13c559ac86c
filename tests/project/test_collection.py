"""What is collected where little is installed, and what `make quick` leaves out."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def closure(requirements: list[str]) -> set[str]:
    """The distributions that these bring along."""
    found: set[str] = set()
    todo = [*requirements]
    while todo:
        required = Requirement(todo.pop())
        name = required.name.lower().replace("_", "-")
        if name not in found and (not required.marker or required.marker.evaluate({"extra": ""})):
            found.add(name)
            todo += metadata.requires(name) or []
    return found


def test_doctests_of_the_core_are_collected_by_what_make_quick_installs() -> None:
    installed = closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["quick"]])
    missing = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not {owner.lower().replace("_", "-") for owner in owners} & {*installed, "gcfunc"}
    ]
    assert {"mmengine", "rich", "transformers"} <= {*missing}
    # To Python, a module that is None is one that is not installed. So are pytest's plugins.
    collect = (
        "import pytest, sys; sys.modules.update(dict.fromkeys(sys.argv[1:]));"
        "sys.exit(pytest.main(['gcfunc', '--collect-only', '-q', '-p', 'pytest_timeout']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", collect, *missing],
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    with_doctests = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gcfunc").rglob("*.py")
        if ">>>" in path.read_text("utf-8")
    }
    assert collected == with_doctests


def test_what_compiles_is_marked(request: pytest.FixtureRequest, fresh_compiler: None) -> None:
    assert request.node.get_closest_marker("compiles")


def test_what_does_not_is_not_marked(request: pytest.FixtureRequest) -> None:
    assert not request.node.get_closest_marker("compiles")
    assert not request.node.get_closest_marker("processes")
