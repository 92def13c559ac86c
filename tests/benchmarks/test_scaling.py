"""The scaling curves: what is measured, what is too much, and what is written."""

import contextlib
import io
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from benchmarks.curves import lines, point, scaling
from benchmarks.harness import bandwidth, measure, processes
from benchmarks.harness.shapes import Shapes
from benchmarks.peers.candidates import FUSED

SHAPES: Shapes = {"a.weight": (3, 4), "b.weight": (5, 2)}
Row = dict[str, Any]


@pytest.mark.parametrize(
    ("algorithm", "held", "moved"),
    [
        # 22 parameters of 4 bytes: read p, g, b; write p, b.
        ("sgd", 22 * 4 * 3, 22 * 4 * (3 + 2)),
        # Read p, g, m, v; write p, m, v.
        ("adamw", 22 * 4 * 4, 22 * 4 * (4 + 3)),
    ],
)
def test_bytes_that_a_step_must_move(algorithm: str, held: int, moved: int) -> None:
    assert bandwidth.held(algorithm, SHAPES) == held
    assert bandwidth.moved(algorithm, SHAPES) == moved


def test_a_copy_touches_what_is_asked_and_reads_what_it_overwrites() -> None:
    copy = bandwidth.copy(80)
    target = copy.call()
    assert isinstance(target, torch.Tensor)
    assert target.nbytes == 40
    assert (target == 1).all()
    assert copy.moved == 3 * 40


def test_the_largest_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "MOST", 800)
    assert bandwidth.copy(10**15).moved == 3 * 400


@pytest.mark.parametrize("n", [10, 300, 2000])
def test_shapes_along_the_number_of_tensors(n: int) -> None:
    alike, different = lines.alike(n), lines.different(n)
    assert len(alike) == len(different) == n
    assert len({*alike.values()}) == 1
    assert len({width for _, width in different.values()}) == n
    for shapes in (alike, different):
        assert bandwidth.elements(shapes) == pytest.approx(4_000_000, rel=0.35)


@pytest.mark.parametrize("total", lines.SIZES)
def test_shapes_along_the_number_of_parameters(total: int) -> None:
    assert bandwidth.elements(lines.alike(10, total)) == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("width", lines.WIDTHS)
def test_shapes_along_the_row_width(width: int) -> None:
    assert bandwidth.elements(lines.wide(width)) == 2**24


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> list[Row]:
    """The rows that the command writes."""
    monkeypatch.setattr(measure, "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", ["scaling", *args, "--seconds", "0", "--device", "cpu"])
    scaling.main()
    written = json.loads((folder / "scaling.json").read_text())
    assert written["command"].startswith("python -m benchmarks.curves.scaling --curves")
    rows: list[Row] = written["rows"]
    return rows


def here(
    module: str, *args: str, limit: float | None = None, cache: str | None = None
) -> list[Row]:
    """:func:`processes.run` without the process."""
    if args[0] == "trivial":
        return []
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, *args])
        point.main()
    return [json.loads(line) for line in printed.getvalue().splitlines()]


def no_trivial(module: str, *args: str, **kwargs: Any) -> list[Row]:
    """:func:`processes.run` with an empty cache to start from."""
    return [] if args[0] == "trivial" else RUN(module, *args, **kwargs)


RUN = processes.run


def assert_picture(path: Path) -> None:
    image = matplotlib.image.imread(path)[..., :3]
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.01


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("curve", "points"),
    [
        ("tensors", [1, 2]),
        pytest.param("parameters", [1000, 8000], marks=pytest.mark.slow),
        ("width", [64]),
    ],
)
def test_steps_print_write_and_draw(
    curve: str,
    points: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(processes, "run", here)
    given = ["--curves", curve, "--quantities", "time", "memory", "--points", *map(str, points)]
    rows = run(monkeypatch, tmp_path, *given)
    found = {(row["line"], row["at"], row["candidate"]) for row in rows}
    assert found == {
        (title, at, candidate)
        for title, line in lines.CURVES[curve].items()
        for at in points
        for candidate in (*line.candidates, point.LIMIT)
    }
    for row in rows:
        line = lines.CURVES[curve][row["line"]]
        assert row["seconds"] > 0
        if row["candidate"] == point.LIMIT:
            assert row["bandwidth"] > 0
            assert row["moved"] == bandwidth.moved(line.algorithm, line.shapes(row["at"]))
            assert row["seconds"] == pytest.approx(row["moved"] / row["bandwidth"])
        else:
            assert row["beyond"] >= 0
    assert_picture(tmp_path / f"scaling_{curve}.png")
    out = capsys.readouterr().out
    assert f"| {lines.AXES[curve]} | {FUSED} | bandwidth limit |" in out
    assert "MB |" in out


def only(monkeypatch: pytest.MonkeyPatch, curve: str, line: str) -> None:
    monkeypatch.setattr(scaling, "CURVES", {curve: {line: lines.CURVES[curve][line]}})


@pytest.mark.slow
def test_compilation_and_steps_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "run", no_trivial)
    only(monkeypatch, "tensors", "SGD, no two of one width")
    rows = run(monkeypatch, tmp_path, "--curves", "tensors", "--points", "2", "--limit", "200")
    compiled, *steps = rows
    assert (compiled["part"], compiled["candidate"]) == ("compile", "gcfunc")
    assert compiled["cold"] > 0
    assert compiled["warm"] > 0
    assert {row["part"] for row in steps} == {"steps"}
    assert not any("skipped" in row for row in rows)
    assert_picture(tmp_path / "scaling_tensors.png")


def test_a_compilation_beyond_the_limit_is_recorded_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "run", no_trivial)
    only(monkeypatch, "width", "SGD, 4 tensors")
    given = ["--curves", "width", "--quantities", "compile", "--points", "4", "16"]
    rows = run(monkeypatch, tmp_path, *given, "--limit", "0.2")
    assert [(row["at"], row["candidate"], row.get("more_than")) for row in rows] == [
        (4, "gcfunc packed", 0.2),
        (4, "gcfunc", 0.2),
        (16, "gcfunc packed", None),
        (16, "gcfunc", None),
    ]
    assert {row["skipped"] for row in rows} == {"compiling 4 took more than 0.2 s"}
    assert "| compiling 4 took more than 0.2 s |" in capsys.readouterr().out


def test_steps_that_take_too_long_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfinished(_: str, what: str, *args: str, **__: Any) -> list[Row]:
        if what == "trivial":
            return []
        calls.append(args)
        row = {"candidate": FUSED, "seconds": 1.0, "ratio": 1.0}
        raise processes.UnfinishedError("was killed by SIGKILL", [row])

    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(processes, "run", unfinished)
    given = ["--curves", "width", "--quantities", "time", "--points", "4", "16"]
    rows = run(monkeypatch, tmp_path, *given)
    assert [row["candidate"] for row in rows] == [*lines.CANDIDATES] * 2
    skipped = [row.get("skipped") for row in rows[:4]]
    assert skipped == [None] + 3 * ["stepping 4 was killed by SIGKILL"]
    assert [args[args.index("--candidates") + 1 :] for args in calls] == [
        (*lines.CANDIDATES,),
        (FUSED,),
    ]


def test_a_point_without_memory_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "run", no_trivial)
    rows = run(monkeypatch, tmp_path, "--curves", "parameters", "--points", str(10**15))
    # Compilation of two candidates and steps of four, in two lines.
    assert len(rows) == 2 * (2 + 4)
    assert all("20,000,0" in row["skipped"] for row in rows if row["line"].startswith("SGD"))
    assert all("GB available" in row["skipped"] for row in rows)
    assert "GB needed" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh_compiler")
def test_one_by_one_where_memory_suffices_for_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "run", here)
    only(monkeypatch, "parameters", "SGD, 10 tensors")
    shapes = lines.CURVES["parameters"]["SGD, 10 tensors"].shapes(1000)
    alone = point.Point("sgd", shapes, "cpu", 0.0).needs(turns=False)
    assert alone == bandwidth.elements(shapes) * 20
    for module in (scaling, point):
        monkeypatch.setattr(module, "available", lambda _: alone)
    given = ["--curves", "parameters", "--quantities", "time", "--points", "1000"]
    rows = run(monkeypatch, tmp_path, *given)
    assert [row["candidate"] for row in rows] == [
        FUSED,
        point.LIMIT,
        *[*lines.CANDIDATES][1:],
    ]
    assert not any(row["turns"] for row in rows)
    assert "(not in turns)" in capsys.readouterr().out


@pytest.mark.slow
def test_hooks_by_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "HOOKED", {"MLP": "mlp"})
    rows = run(monkeypatch, tmp_path, "--curves", "processes", "--points", "1", "2")
    assert [(row["at"], row["candidate"]) for row in rows] == [
        (size, candidate)
        for size in (1, 2)
        for candidate in (scaling.UNHOOKED, "centralize_backward", "register_ddp")
    ]
    assert all(row["seconds"] > 0 for row in rows)
    cores = measure.machine()["cores"]
    assert f"processes of one thread, on {cores} cores" in capsys.readouterr().out
    assert_picture(tmp_path / "scaling_processes.png")
    assert not multiprocessing.active_children()


def test_a_process_that_fails_is_an_error() -> None:
    with pytest.raises(processes.UnfinishedError, match="failed with 2") as raised:
        processes.run("benchmarks.curves.point", "unknown")
    assert not raised.value.late


def test_a_process_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(processes.UnfinishedError, match=r"took more than 0\.1 s") as raised:
        processes.run("benchmarks.curves.point", "trivial", limit=0.1)
    assert raised.value.late
