"""The plan of the package: imports in one direction, and modules that can be found and read."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gcfunc"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

BELOW: dict[str, tuple[str, ...]] = {
    "_tensors": (),
    "_rows": ("_tensors",),
    "_centralization": ("_tensors", "_rows"),
    "_step": ("_tensors", "_centralization"),
    "_algorithms": ("_tensors", "_centralization", "_step"),
    "hooks": ("_tensors", "_centralization"),
    "_training": ("_tensors", "_step"),
    "_compiled": ("_tensors", "_rows", "_centralization", "_step", "_training"),
    "optim": ("_tensors", "_rows", "_centralization", "_step", "_algorithms", "_compiled"),
}
"""What each wing may import. docs/design.md has it as a picture."""
ABOVE = ("recipes", "integrations")
"""These use the library, and nothing in it uses them."""


def reached(wing: str, arrows: set[tuple[str, str]]) -> set[str]:
    below = {to for start, to in arrows if start == wing}
    return below.union(*(reached(to, arrows) for to in below))


def test_the_picture_shows_it() -> None:
    picture = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("```mermaid")[2]
    lines = picture.partition("```")[0].splitlines()
    found = (re.match(r"\s*(\w+)(?:\[.*\])? --> (\w+)", line) for line in lines)
    arrows = {(match[1], match[2]) for match in found if match}
    assert {wing for wing, _ in arrows} | {"_tensors"} == {*BELOW}
    for wing, below in BELOW.items():
        assert {to for start, to in arrows if start == wing} <= {*below}
        assert {*below} <= reached(wing, arrows)


def wing_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(module: str) -> list[str]:
    """The modules of the package that one imports anywhere in its text, type checking included."""
    found: list[str] = []
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where things are"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [sub if sub in MODULES else str(node.module) for sub in submodules]
    return [name for name in found if name in MODULES]


@pytest.mark.parametrize("module", [m for m in MODULES if wing_of(m) in BELOW])
def test_wings_import_those_below(module: str) -> None:
    wing = wing_of(module)
    others = {wing_of(name) for name in imported(module)} - {wing}
    assert others <= {*BELOW[wing]}


def test_every_wing_has_its_place() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == {*BELOW, *ABOVE}


@pytest.mark.parametrize("wing", BELOW)
def test_within_a_wing_there_are_no_circles(wing: str) -> None:
    left = {m: {n for n in imported(m) if wing_of(n) == wing} - {m} for m in MODULES}
    left = {m: needs for m, needs in left.items() if wing_of(m) == wing}
    while ready := [m for m, needs in left.items() if not needs]:
        left = {m: needs - {*ready} for m, needs in left.items() if m not in ready}
    assert not left, f"circle among {', '.join(left)}"


def test_the_formula_stands_on_torch_alone() -> None:
    assert imported("gcfunc._centralization.formula") == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_hidden_by_something_of_its_name(module: str) -> None:
    if module in ("gcfunc", "gcfunc.__main__"):
        return
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{module} needs {error.name}")
    parent, _, name = module.rpartition(".")
    assert getattr(importlib.import_module(parent), name) is found


@pytest.mark.parametrize(
    ("folder", "most"), [("gcfunc", 300), ("benchmarks", 600), ("tests", 600), ("examples", 100)]
)
def test_no_file_is_too_long_to_read(folder: str, most: int) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > most}


def test_pytrees_are_walked_in_one_place() -> None:
    walking = [m for m, path in MODULES.items() if "_pytree" in path.read_text(encoding="utf-8")]
    assert walking == ["gcfunc._tensors.trees"]
