"""Each notebook exists twice: a script to edit, and the executed page that readers see."""

import re
from pathlib import Path
from typing import Any

import jupytext  # type: ignore[import-untyped]
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
PAGES = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path) -> list[Any]:
    return list(jupytext.read(path).cells)


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_every_script_has_its_page_and_every_page_its_script() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts
    assert scripts == {path.stem for path in PAGES}


def test_script_and_page_hold_the_same_cells(page: Path) -> None:
    script, shown = (
        [(cell.cell_type, cell.source) for cell in cells(path)]
        for path in (page.with_suffix(".py"), page)
    )
    assert shown == script


def test_every_code_cell_was_executed_in_order(page: Path) -> None:
    code = [cell for cell in cells(page) if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_no_cell_failed_or_warned(page: Path) -> None:
    outputs = [output for cell in cells(page) for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_the_page_says_nothing_about_the_machine_it_ran_on(page: Path) -> None:
    notebook = jupytext.read(page)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not [cell.source for cell in notebook.cells if "execution" in cell.metadata]
    assert not re.findall(r"/(?:home|root|tmp|work|var|Users)/\S*", page.read_text("utf-8"))
