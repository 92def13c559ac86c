"""The README's tables, between markers, and its chart.

Figures are from ``benchmarks/results``, algorithms from the catalogue.

python -m benchmarks.tables.figures
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import measure
from benchmarks.harness.shapes import MODELS
from gcfunc._catalog import CATALOG

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)

ALGORITHMS = {"sgd": "SGD", "adamw": "AdamW", "adagrad": "Adagrad"}
NAMES = {
    "resnet50": "ResNet-50",
    "resnet50_64": "ResNet-50 at 64x64",
    "vit_b16": "ViT-B/16",
    "gpt2": "GPT-2 small",
    "gpt2_48_blocks": "GPT-2 with 48 blocks",
    "tiny_cnn": "a tiny CNN",
    "cnn": "small CNN",
    "mlp": "MLP of width 512 at batch 64",
    "transformer": "small transformer",
}
OURS = {
    "gcfunc packed": "gcfunc packed",
    "gcfunc": "gcfunc",
    "gcfunc drop-in": "gcfunc.optim",
    "gcfunc packed, and packing": "gcfunc packed, packing in each step",
    "gcfunc packed, no GC": "gcfunc packed, no GC",
}
WITH_GC = {
    "torch fused + loop": "torch fused after a loop",
    "torch compiled + loop": "torch compiled, with the loop",
    "torch foreach + loop": "torch foreach after a loop",
    "torch for-loop + loop": "torch for-loop after a loop",
    "pytorch_optimizer GC + torch fused": "pytorch_optimizer's GC, torch fused",
    "pytorch_optimizer": "pytorch_optimizer's SGDW, AdamP",
    "optax": "optax on JAX",
    "reference loop": "the reference's loop",
}
WITHOUT = {
    "torch compiled, no GC": "torch compiled, no GC",
    "torch foreach, no GC": "torch foreach, no GC",
    "torch for-loop, no GC": "torch for-loop, no GC",
    "optimi, no GC": "optimi, no GC",
}
LABELS = OURS | WITH_GC | WITHOUT
"""Candidates of ``benchmarks.peers.speed``, in the order of table and chart."""

Row = dict[str, Any]
Rows = list[Row]


def result(name: str) -> dict[str, Any]:
    """A file of results; one without rows, if there is none."""
    path = measure.results(name)
    found: dict[str, Any] = {"rows": []}
    return json.loads(path.read_text()) if path.exists() else found


def present(order: Iterable[str], rows: Rows, field: str) -> list[str]:
    """Those that rows have in a field."""
    there = {row[field] for row in rows}
    return [name for name in order if name in there]


def pick(rows: Rows, **fields: object) -> Rows:
    """The rows with these values, in the order of models and algorithms."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def table_of_speed() -> str:
    """A row for each candidate, a column for each model, a number for each algorithm."""
    content = result("speed")
    rows: Rows = content["rows"]
    models, algorithms = present(MODELS, rows, "model"), present(ALGORITHMS, rows, "algorithm")
    head = [dots(ALGORITHMS[a] for a in algorithms), *map(title, models)]
    fused = [dots(baseline(rows, m, a) for a in algorithms) for m in models]
    lines = [["torch fused, no GC, in ms", *fused]]
    for candidate in present(LABELS, rows, "candidate"):
        own = pick(rows, candidate=candidate)
        cells = [
            dots(ratio(pick(own, model=m, algorithm=a)) for a in algorithms)
            if pick(own, model=m)
            else ""
            for m in models
        ]
        lines.append([LABELS[candidate], *cells])
    parts = [measure.table(head, lines), *failures(rows)]
    if rows:
        parts.append(f"`{content['command']}` on {where(content['machine'])}.")
    return "\n\n".join(parts)


def title(model: str) -> str:
    """A model with its size."""
    shapes = MODELS[model]()
    values = sum(map(math.prod, shapes.values()))
    return f"{NAMES[model]}, {len(shapes)} tensors, {values / 1e6:.1f} M"


def baseline(rows: Rows, model: str, algorithm: str) -> str:
    """The median of torch fused's times."""
    own = pick(rows, model=model, algorithm=algorithm)
    times = [row["baseline"] for row in own if "error" not in row]
    return f"{1e3 * statistics.median(times):.1f}" if times else "not run"


def ratio(rows: Rows) -> str:
    """Of the only row, if any; bold if the time is less than torch's."""
    if not rows:
        return "not run"
    if "error" in rows[0]:
        return "failed"
    text = f"{rows[0]['ratio']:.2f}"
    return f"**{text}**" if float(text) < 1 else text


def failures(rows: Rows) -> list[str]:
    """A sentence about each error, for all models that it came with."""
    failed: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            which = (row["candidate"], row["algorithm"], row["error"])
            failed.setdefault(which, []).append(NAMES[row["model"]])
    everywhere = len(present(MODELS, rows, "model"))
    return [
        f"Failed: {LABELS.get(candidate, candidate)}, {ALGORITHMS.get(algorithm, algorithm)}"
        f"{'' if len(models) == everywhere else f', {commas(models)}'}: `{error}`."
        for (candidate, algorithm, error), models in failed.items()
    ]


def where(machine: dict[str, Any]) -> str:
    """A machine in words."""
    return (
        f"{machine['cores']} cores of {machine['device']} ({machine['vector_instructions']}), "
        f"torch {machine['torch']}"
    )


def table_of_costs() -> str:
    """Whatever else was measured."""
    lines = [*memory(), *overhead(), *hooks(), *train_step(), *compile_time()]
    return measure.table(["", "command", "found"], lines)


def memory() -> list[list[str]]:
    """The peak memory of a step."""
    rows = result("memory")["rows"]
    candidates = present(["gcfunc packed", "gcfunc", "reference loop"], rows, "candidate")
    found = [
        f"{LABELS[c]} {span([row['ratio'] for row in pick(rows, candidate=c)], 3)}"
        for c in candidates
    ]
    what = "peak memory of a step: params, gradients, slots, and what it takes besides"
    return line(f"{what}; to torch fused", "memory", found)


def overhead() -> list[list[str]]:
    """A call with next to nothing to compute."""
    rows = result("overhead")["rows"]
    algorithms = present(ALGORITHMS, rows, "algorithm")
    found = []
    for candidate in present(["gcfunc packed", "gcfunc", "gcfunc drop-in"], rows, "candidate"):
        own = [row for a in algorithms for row in pick(rows, candidate=candidate, algorithm=a)]
        ours, theirs = (
            commas(f"{1e3 * row[f]:.2f}" for row in own) for f in ("seconds", "baseline")
        )
        found.append(f"{LABELS[candidate]} {ours} ms, where torch fused takes {theirs}")
    what = f"a call on tensors of one element, {commas(ALGORITHMS[a] for a in algorithms)}"
    return line(what, "overhead", found)


def hooks() -> list[list[str]]:
    """Gradient hooks, in one process and in two."""
    rows = result("hooks")["rows"]
    names = NAMES | {"resnet50": "ResNet-50 at 128x128"}
    lines = []
    for processes, candidate, what in (
        (1, "centralize_backward", "gradient hooks, to forward and backward without"),
        (1, "loop after backward", "... a loop after backward instead"),
        (2, "centralize_backward", "... hooks, in two processes with DDP"),
        (2, "register_ddp", "... `register_ddp` instead"),
    ):
        own = pick(rows, processes=processes, candidate=candidate)
        modes = present(["eager", "compiled"], own, "mode")
        found = [
            f"{names[m]} "
            + commas(f"{row['ratio']:.2f}" for x in modes for row in pick(own, model=m, mode=x))
            for m in present(NAMES, own, "model")
        ]
        lines += line(f"{what}; {commas(modes)}", "hooks", found)
    return lines


def train_step() -> list[list[str]]:
    """Whole training steps."""
    rows = result("train_step")["rows"]
    algorithms = present(ALGORITHMS, rows, "algorithm")
    found = []
    for model in present(NAMES, rows, "model"):
        of = {
            candidate: [
                row["ratio"]
                for a in algorithms
                for row in pick(rows, model=model, candidate=candidate, algorithm=a)
            ]
            for candidate in ("gcfunc", "not compiled, no GC")
        }
        ours, eager = of["gcfunc"], of["not compiled, no GC"]
        text = f"{NAMES[model]} {commas(f'{r:.2f}' for r in ours)}"
        if len(eager) == len(ours) and max(eager, default=1) < 1:
            to_eager = commas(f"{a / b:.2f}" for a, b in zip(ours, eager, strict=True))
            text += f" ({to_eager} to the loop without compilation, which is the faster one there)"
        found.append(text)
    what = (
        "a whole training step with GC, to `torch.compile(model)`, autograd and torch fused "
        f"without, {commas(ALGORITHMS[a] for a in algorithms)}"
    )
    return line(what, "train_step", found)


def compile_time() -> list[list[str]]:
    """The first step."""
    rows = result("compile_time")["rows"]
    trivial = {
        s: statistics.median([r[s]["trivial"] for r in rows] or [0]) for s in ("cold", "warm")
    }
    lines: list[list[str]] = []
    for model in present(NAMES, rows, "model"):
        algorithms = present(ALGORITHMS, pick(rows, model=model), "algorithm")
        found = []
        for form, said in (("packed", "packed"), ("unpacked", "not packed")):
            own = [r for a in algorithms for r in pick(rows, model=model, algorithm=a, form=form)]
            if own:
                cold, warm = (
                    commas(f"{r[s]['first_step']:.1f}" for r in own) for s in ("cold", "warm")
                )
                found.append(f"{said} {cold} s, with a warm cache {warm} s")
        what = (
            f"compiling for {NAMES[model]}, {commas(ALGORITHMS[a] for a in algorithms)}, beyond a "
            f"trivial function's {trivial['cold']:.0f} s, with a warm cache {trivial['warm']:.0f} s"
            if not lines
            else f"... for {NAMES[model]}, {commas(ALGORITHMS[a] for a in algorithms)}"
        )
        lines += line(what, "compile_time", found)
    return lines


def line(what: str, benchmark: str, found: Sequence[str]) -> list[list[str]]:
    """A line of the table, if anything was found."""
    if not found:
        return []
    _, _, module, *_ = result(benchmark)["command"].split()
    return [[what, "" if what.startswith("...") else f"`{module}`", "; ".join(found)]]


def commas(texts: Iterable[str]) -> str:
    """A list."""
    return ", ".join(texts)


def dots(texts: Iterable[str]) -> str:
    """A list in a cell."""
    return " · ".join(texts)


def span(values: Sequence[float], digits: int) -> str:
    """The least and the most."""
    low, high = (f"{end(values):.{digits}f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def table_of_algorithms() -> str:
    """A row for each of the catalogue."""
    lines = []
    for name, row in CATALOG.items():
        constructor = f"`{name}(inner)`" if row.around else f"`{name}`"
        equal_to = f"torch's `{row.twin.__name__}`" if row.twin else ""
        reference = commas(f"`{other}`" for other in row.reference)
        either = row.takes("decoupled_weight_decay")
        decay = "of `inner`" if row.around else "either" if either else row.decay
        lines.append([constructor, f"`{row.drop_in.__name__}`", equal_to, decay, reference])
    head = ["", "in `gcfunc.optim`", "equal without GC", "weight decay", "the reference's names"]
    return measure.table(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "algorithms": table_of_algorithms,
    "speed": table_of_speed,
    "costs": table_of_costs,
}


def rendered(text: str) -> str:
    """A text with what belongs between its markers."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)


def chart(path: Path) -> None:
    """A panel for each model: ratios with their quartiles, in the order of the table."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows: Rows = result("speed")["rows"]
    models, algorithms = present(MODELS, rows, "model"), present(ALGORITHMS, rows, "algorithm")
    candidates = present(LABELS, rows, "candidate")
    # Okabe and Ito's colours, which colour-blind people tell apart.
    styles = dict(
        zip(ALGORITHMS, (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^")), strict=True)
    )
    panels = max(1, len(models))
    columns = min(2, panels)
    height = 1.2 + math.ceil(panels / columns) * (0.6 + 0.32 * len(candidates))
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(
        math.ceil(panels / columns), columns, sharex=True, sharey=True, squeeze=False
    )
    for ax in axes.flat[len(models) :]:
        ax.set_visible(False)
    for ax, model in zip(axes.flat, models, strict=False):
        for y, candidate in enumerate(candidates):
            if y % 2:
                ax.axhspan(y - 0.5, y + 0.5, color="#f2f2f2", zorder=0)
            for row in pick(rows, model=model, candidate=candidate):
                color, marker = styles[row["algorithm"]]
                at = y + 0.25 * (algorithms.index(row["algorithm"]) - (len(algorithms) - 1) / 2)
                if "error" in row:
                    # At the left edge, whatever the limits become.
                    ax.plot(0.02, at, "x", color=color, transform=ax.get_yaxis_transform())
                    continue
                ax.plot([row["low"], row["high"]], [at, at], color=color, linewidth=1.5)
                hollow = candidate.endswith("no GC")
                ax.plot(row["ratio"], at, marker, color=color, mfc="white" if hollow else color)
        ax.axvline(1, color="black", linewidth=1)
        ax.set_title(title(model), fontsize=11)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.tick_params(axis="x", labelbottom=True)
        ax.grid(axis="x", color="#d0d0d0", linewidth=0.5)
        ax.set_axisbelow(True)
        ax.set_yticks(range(len(candidates)), [LABELS[c] for c in candidates], fontsize=10)
        ax.set_ylim(len(candidates) - 0.5, -0.5)
    for ax in axes[:, 0]:
        for text, candidate in zip(ax.get_yticklabels(), candidates, strict=False):
            text.set_fontweight("bold" if candidate in OURS else "normal")
    figure.supxlabel(
        "time of a step, to torch fused without GC (median and quartiles; left of 1 is faster)"
    )
    plain: dict[str, Any] = {"linestyle": "", "color": "#555555"}
    legend = [
        *(
            Line2D([], [], color=styles[a][0], marker=styles[a][1], label=ALGORITHMS[a])
            for a in algorithms
        ),
        Line2D([], [], marker="o", mfc="white", label="without GC", **plain),
        *([Line2D([], [], marker="x", label="failed", **plain)] if failures(rows) else []),
    ]
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README is right")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    new = rendered(text)
    if args.check:
        if new != text:
            why = "README.md is not what benchmarks/results say"
            sys.exit(f"{why}; run python -m benchmarks.tables.figures")
        return
    README.write_text(new, encoding="utf-8")
    chart(measure.RESULTS / "speed.png")


if __name__ == "__main__":
    main()
