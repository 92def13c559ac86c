"""What each ratio may be: benchmarks/budgets/cpu.toml, and how its numbers come about.

A budget is what was measured, and the margin that noise is given:

    make bench WHAT=save
    make bench WHAT=budgets        # from the latest figure of each case that was saved
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import measure

Case = dict[str, Any]

FOLDER = Path(__file__).parents[1] / "budgets"
STORAGE = Path(".benchmarks")
"""Where pytest-benchmark keeps its runs."""
MARGIN = 1.25

HEAD = """\
# The most that each benchmark may take, as a ratio of medians to its baseline in the same run:
# {margin} times what was measured when its line was written, rounded up. Commit a higher number
# only with the reason. `make bench WHAT=budgets` writes the file from what `WHAT=save` kept.
# It holds for machines like this one: {machine}.
"""


def path(device: str) -> Path:
    """Where a device's budgets are."""
    return FOLDER / f"{device}.toml"


def load(path: Path) -> dict[str, float]:
    """Budgets by the full name of their case."""
    found: dict[str, float] = {}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}.", value)
            else:
                found[prefix + key] = value

    walk("", tomllib.loads(path.read_text()))
    return found


def history(name: str, device: str, storage: Path) -> list[str]:
    """What was found for a case when its budget was set, and in saved runs; the latest last."""
    cases = [*committed(device), *saved(storage)]
    found = [case for case in cases if (case["case"], case["device"]) == (name, device)]
    found.sort(key=lambda case: case["datetime"])
    texts = (f"{c['ratio']:.3f} ({c['datetime'][:10]}, {c['commit']})" for c in found)
    return [*dict.fromkeys(texts)]


def committed(device: str) -> list[Case]:
    """What budgets were set from."""
    path = measure.results("budgets", device)
    rows: list[Case] = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row | {"device": device} for row in rows]


def saved(storage: Path, runs: str = "[0-9]*") -> list[Case]:
    """The cases of saved runs, the latest last."""
    found = [json.loads(path.read_text()) for path in storage.glob(f"*/{runs}.json")]
    return [
        benchmark["extra_info"] | {"datetime": run["datetime"], "commit": commit(run)}
        for run in sorted(found, key=lambda run: run["datetime"])
        for benchmark in run["benchmarks"]
        if "case" in benchmark["extra_info"]  # or it failed before it was measured
    ]


def commit(run: Mapping[str, Any]) -> str:
    """What a saved run measured; with a + if that was changed without being committed."""
    info = run["commit_info"]
    return f"{info['id'][:7]}{'+' if info['dirty'] else ''}"


def verdict(
    name: str, ratio: float, budgets: Mapping[str, float], history: Callable[[], Sequence[str]]
) -> str | None:
    """What is wrong with a ratio, if anything; nothing can be where there is no budget."""
    if ratio <= budgets.get(name, math.inf):
        return None
    return (
        f"{name}: {ratio:.3f} is over its budget of {budgets[name]:.3f}; "
        f"history: {', '.join(history()) or 'none saved'}"
    )


def commands(tests: Sequence[str] = ()) -> str:
    """What sets the budgets of these tests, or of all."""
    options = f""" OPTIONS='-k "{" or ".join(tests)}"'""" if tests else ""
    return f"make bench WHAT=save{options}, then make bench WHAT=budgets"


def budget(ratio: float) -> float:
    """For a case that was measured at this ratio: three digits, rounded up."""
    most = ratio * MARGIN
    digits = 2 - math.floor(math.log10(most))
    scale = 10.0**digits
    return round(math.ceil(round(most * scale, 6)) / scale, digits)


def written(budgets: Mapping[str, float], device: str = "cpu") -> str:
    """A TOML file of them, one line for each last but one part of the name."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in budgets.items():
        table, row, column = name.rsplit(".", 2)
        tables.setdefault(table, {}).setdefault(row, {})[column] = value
    machine = measure.machine(device)
    where = machine["device"]
    if device == "cpu":
        where = f"{machine['cores']} cores of {where}, {machine['vector_instructions']}"
    lines = [HEAD.format(margin=MARGIN, machine=where)]
    for table, rows in tables.items():
        lines.append(f"[{table}]")
        for row, columns in rows.items():
            inner = ", ".join(f"{column} = {value:g}" for column, value in columns.items())
            lines.append(f"{row} = {{ {inner} }}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Set the budgets of the cases that were saved, and keep their figures as results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, default=STORAGE)
    args = parser.parse_args()
    latest = {(case["device"], case["case"]): case for case in saved(args.storage)}
    if not latest:
        parser.error(f"no run is saved in {args.storage}; make bench WHAT=save saves one")
    for device in sorted({device for device, _ in latest}):
        own = [case for (its, _), case in latest.items() if its == device]
        file = path(device)
        budgets = load(file) if file.exists() else {}
        changed = {case["case"]: budget(case["ratio"]) for case in own}
        for name, value in changed.items():
            if (before := budgets.get(name, math.inf)) != value:
                print(f"{name}: {before} -> {value}{' RAISED' if value > before else ''}")
        file.parent.mkdir(exist_ok=True)
        file.write_text(written(budgets | changed, device))
        cases = {case["case"]: case for case in (*committed(device), *own)}.values()
        lines = [[c["case"], c["to"], f"{c['ratio']:.2f}"] for c in cases]
        rows = [{key: value for key, value in c.items() if key != "device"} for c in cases]
        measure.report("gates.budgets", measure.table(["case", "to", "ratio"], lines), rows, device)


if __name__ == "__main__":
    main()
