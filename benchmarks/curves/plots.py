"""Curves as a picture: a column for each of their lines, a row for each quantity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
# Okabe and Ito's colours, told apart by most eyes.
LOOKS = (("#000000", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#0072B2", "D"))
LIMIT: dict[str, Any] = {"color": "#CC79A7", "linestyle": "--", "linewidth": 2}
HOLLOW: dict[str, Any] = {"linestyle": "", "markerfacecolor": "white", "zorder": 3}

Row = dict[str, Any]


class Panel(NamedTuple):
    """A quantity.

    Attributes:
        label: With its unit.
        key: Of the rows that have it.
        scale: From their unit.
        dotted: A further key, of what is drawn dotted.
        floor: The axis is logarithmic beyond this, linear below.
    """

    label: str
    key: str
    scale: float = 1.0
    dotted: str = ""
    floor: float = 0.0


PANELS = (
    Panel("time of a step, ms", "seconds", 1e3),
    Panel("... as a ratio to the black\n(hollow: not in turns)", "ratio"),
    Panel("compilation, s\n(dotted: cache warm)", "cold", dotted="warm"),
    Panel("memory of a step beyond\nwhat is held, MB", "beyond", 1e-6, floor=0.1),
)


def draw(path: Path, axis: str, rows: Sequence[Row]) -> None:
    """A PNG of what was measured along one curve; ``axis`` is what changes along it."""
    panels = [panel for panel in PANELS if any(panel.key in row for row in rows)]
    if not panels:
        return
    lines = list(dict.fromkeys(row["line"] for row in rows))
    looks = _looks(rows)
    with matplotlib.rc_context(STYLE):
        size = (1.0 + 4.2 * len(lines), 0.9 + 2.4 * len(panels))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(panels), len(lines), sharex=True, sharey="row", squeeze=False)
        for panel, across in zip(panels, grid, strict=True):
            across[0].set_ylabel(panel.label)
            for line, axes in zip(lines, across, strict=True):
                own = [row for row in rows if row["line"] == line]
                for candidate, look in looks.items():
                    _plot(axes, panel, [r for r in own if r["candidate"] == candidate], look)
            _scale(across[0], panel, sorted({row["at"] for row in rows}))
        for line, top, bottom in zip(lines, grid[0], grid[-1], strict=True):
            top.set_title(line, fontsize=10)
            bottom.set_xlabel(axis)
        handles = [Line2D([], [], label=candidate, **look) for candidate, look in looks.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(handles)))
        figure.savefig(path, dpi=120)


def _looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """How to draw each candidate, the baseline first."""
    timed = sorted(rows, key=lambda row: row["part"] != "steps")
    names = dict.fromkeys(row["candidate"] for row in timed)
    limits = {row["candidate"]: LIMIT for row in rows if "bandwidth" in row}
    looks = zip([name for name in names if name not in limits], itertools.cycle(LOOKS))
    return {name: {"color": c, "marker": m, "markersize": 4} for name, (c, m) in looks} | limits


def _plot(axes: Axes, panel: Panel, rows: Sequence[Row], look: dict[str, Any]) -> None:
    for key, style in ((panel.key, {}), (panel.dotted, {"linestyle": ":"})):
        has = [row for row in rows if key in row]
        xs, ys = [row["at"] for row in has], [panel.scale * row[key] for row in has]
        axes.plot(xs, ys, **look | style)
        apart = [i for i, row in enumerate(has) if not row.get("turns", True)]
        axes.plot(xs, ys, **look | HOLLOW, markevery=apart)
    if panel.dotted:
        for row in rows:
            if "more_than" in row:
                more = look | {"marker": "$\\uparrow$", "markersize": 14}
                axes.plot(row["at"], row["more_than"], **more)


def _scale(axes: Axes, panel: Panel, points: Sequence[int]) -> None:
    """For all that share their scales with these axes."""
    axes.set_xscale("log")
    if panel.floor:
        axes.set_yscale("symlog", linthresh=panel.floor)
    else:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if len(points) < 4:
        axes.set_xticks(points, [str(point) for point in points])
        axes.xaxis.set_minor_locator(NullLocator())
