"""The files that newcomers and tools read first say what holds, and agree with one another."""

import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def test_the_linters_are_pinned_as_in_the_constraints() -> None:
    constraints = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [r for r in PROJECT["optional-dependencies"]["quick"] if r.startswith(("ruff", "mypy"))]
    assert len(pins) == 2
    for pin in pins:
        assert "==" in pin
        assert pin in constraints


def test_pre_commit_runs_the_linters_of_make_quick() -> None:
    recipe = re.search(r"^quick:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert recipe
    *linters, tests = re.findall(r"^\t\$\(BIN\)/(.*)$", recipe[1], re.MULTILINE)
    assert tests.startswith("python -m pytest")
    (repo,) = load(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == [f".venv/bin/{line}" for line in linters]


def test_the_editor_is_told_the_line_length_of_ruff() -> None:
    config = configparser.ConfigParser()
    config.read_string("[top]\n" + (ROOT / ".editorconfig").read_text("utf-8"))
    assert config["*.py"]["max_line_length"] == str(PYPROJECT["tool"]["ruff"]["line-length"])


def test_what_is_cited_is_this_version() -> None:
    citation = load("CITATION.cff")
    assert citation["title"] == PROJECT["name"]
    assert citation["abstract"] == PROJECT["description"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text("utf-8")


def test_hosted_ci_runs_what_runs_anywhere() -> None:
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    checkout, python, run = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert PROJECT["requires-python"] == f">={python['with']['python-version']}"
    assert run == {"run": "bash .ci/run"}
    assert (ROOT / ".ci" / "run").is_file()


def test_a_report_asks_for_versions_by_a_command_that_works() -> None:
    fields = {
        field["id"]: field["attributes"] for field in load(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    }
    assert [*fields] == ["versions", "script", "expected", "got"]
    code = re.search(r'`python -c "(.*)"`', fields["versions"]["description"])
    assert code
    done = subprocess.run(
        [sys.executable, "-c", code[1]], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == PROJECT["version"]
