"""What an experiment leaves behind: a table, curves and a JSON file."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.table import Table

from gcfunc._centralization.where import RULES
from gcfunc.recipes import summary
from gcfunc.recipes.config import Config
from gcfunc.recipes.train import Finished

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
_PALETTE = ("#1f77b4", "#d95f02", "#1b9e77", "#e7298a")
COLORS = {"none": "#7f7f7f"} | dict(zip(RULES, itertools.cycle(_PALETTE)))
BAND = 0.18
_LABELS = {"none": "no centralization"} | {
    name: f"centralized: {rule.meaning} ({name})" for name, rule in RULES.items()
}


def table(config: Config, runs: Sequence[Finished]) -> Table:
    """Final quantities per variant, and the difference that centralization makes."""
    many = config.seeds > 1
    shown = Table(
        title=f"{config.optimizer}, after {_count(config.epochs, 'epoch')}"
        + (f", mean ± standard deviation over {config.seeds} seeds" if many else ""),
        caption="change: mean ± standard error, paired by seed"
        if many and config.compare
        else None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("gc", no_wrap=True)
    for quantity in summary.QUANTITIES.values():
        shown.add_column(quantity.heading, justify="right", no_wrap=True)
    for gc in config.variants:
        spreads = {q: summary.spread(summary.finals(runs, gc, q)) for q in summary.QUANTITIES}
        shown.add_row(gc, *[_cell(q, spread.mean, spread.std) for q, spread in spreads.items()])
    if config.compare:
        shown.add_section()
        found = summary.differences(runs, config.gc)
        shown.add_row("change", *[_cell(q, d.mean, d.error, sign="+") for q, d in found.items()])
    return shown


def write_json(
    path: Path,
    config: Config,
    runs: Sequence[Finished],
    facts: Mapping[str, Any],
) -> None:
    """The experiment as JSON: facts about it, the config, every epoch, and the summary.

    Numbers that are not finite, as where a run diverged, become ``null``.
    """
    content: dict[str, Any] = {
        **facts,
        "config": config.to_dict(),
        "runs": [
            {
                "gc": run.gc,
                "seed": run.seed,
                "final": {q: summary.final(run, q) for q in summary.QUANTITIES},
                "history": [vars(epoch) for epoch in run.history],
            }
            for run in runs
        ],
        "summary": {
            gc: {q: vars(summary.spread(summary.finals(runs, gc, q))) for q in summary.QUANTITIES}
            for gc in config.variants
        },
    }
    if config.compare:
        content["difference"] = {
            quantity: {**vars(difference), "is_noise": difference.is_noise}
            for quantity, difference in summary.differences(runs, config.gc).items()
        }
        content["verdict"] = summary.verdict(runs, config.gc)
    temporary = path.with_name(f"{path.name}.tmp")
    text = json.dumps(_finite(content), indent=2, allow_nan=False, ensure_ascii=False)
    temporary.write_text(f"{text}\n", encoding="utf-8")
    temporary.replace(path)


def draw_curves(path: Path, config: Config, runs: Sequence[Finished], dataset: str) -> None:
    """Training loss and test accuracy by epoch, a line and a band for each variant."""
    with matplotlib.rc_context(_STYLE):
        # A Figure of its own, not pyplot's: no display is needed and nothing global changes.
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        for gc in config.variants:
            own = [run for run in runs if run.gc == gc]
            _draw(loss, gc, np.array([[e.train_loss for e in run.history] for run in own]))
            _draw(accuracy, gc, np.array([[e.test_accuracy for e in run.history] for run in own]))
        loss.set(ylabel="training loss")
        if any(math.isfinite(epoch.train_loss) for run in runs for epoch in run.history):
            loss.set_yscale("log")
        accuracy.set(ylabel="test accuracy")
        accuracy.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in (loss, accuracy):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        accuracy.legend(loc="lower right")
        band = f", mean ± standard deviation over {config.seeds} seeds" if config.seeds > 1 else ""
        figure.suptitle(f"{config.optimizer} on {dataset}{band}")
        figure.savefig(path, dpi=160)


def _draw(axes: Axes, gc: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    epochs = np.arange(1, values.shape[1] + 1)
    values = np.where(np.isfinite(values), values, np.nan)
    mean = values.mean(0)
    axes.plot(epochs, mean, color=COLORS[gc], label=_LABELS[gc], marker="o", markersize=3)
    if len(values) > 1:
        std = values.std(0, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, color=COLORS[gc], alpha=BAND, linewidth=0)


def _cell(name: str, value: float, spread: float | None, sign: str = "") -> str:
    quantity = summary.QUANTITIES[name]
    text = quantity.show(value, sign)
    return text if spread is None else f"{text} ± {quantity.show(spread)}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
