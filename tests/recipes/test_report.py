"""What ``gcfunc train`` reports."""

import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from scipy import stats

from gcfunc._catalog import CATALOG
from gcfunc.recipes import report, summary
from gcfunc.recipes.train import Epoch, Finished
from tests.recipes.command import QUICK, train


def test_report_is_consistent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tmp_path, *QUICK, "--compare", "--seeds", "3")
    assert [(r["gc"], r["seed"]) for r in result["runs"]] == [
        (gc, seed) for seed in range(3) for gc in ("none", "gc")
    ]
    assert result["config"]["lr"] == CATALOG["sgd"].training["lr"]
    assert result["data"]["train"] == result["data"]["test"] == 48
    assert result["environment"]["torch"] == torch.__version__
    for quantity in ("train_loss", "test_loss", "test_accuracy"):
        values = {}
        for gc in ("none", "gc"):
            runs = [r for r in result["runs"] if r["gc"] == gc]
            assert all(len(r["history"]) == 2 for r in runs)
            values[gc] = [r["history"][-1][quantity] for r in runs]
            assert [r["final"][quantity] for r in runs] == values[gc]
            assert result["summary"][gc][quantity]["mean"] == pytest.approx(np.mean(values[gc]))
            assert result["summary"][gc][quantity]["std"] == pytest.approx(
                np.std(values[gc], ddof=1)
            )
        expected = np.subtract(values["gc"], values["none"]).mean()
        assert result["difference"][quantity]["mean"] == pytest.approx(expected)

    shown = capsys.readouterr().out
    for gc in ("none", "gc"):
        assert f"{result['summary'][gc]['train_loss']['mean']:.4f} ±" in shown
    assert "".join(result["verdict"].split()) in "".join(shown.split())
    assert not (tmp_path / "checkpoint.pt").exists()


def test_report_says_how_it_was_trained(tmp_path: Path) -> None:
    result = train(tmp_path, *QUICK, "--mode", "hooks")
    assert result["config"]["mode"] == "hooks"
    assert (result["config"]["ddp"], result["config"]["fsdp"]) == (False, False)
    assert result["processes"] == 1
    assert (result["compiled"], result["why_eager"]) == (False, "mode hooks compiles nothing")


def test_curves_show_lines_and_bands_of_both_variants(tmp_path: Path) -> None:
    train(tmp_path, *QUICK, "--compare", "--seeds", "2")
    image = matplotlib.image.imread(tmp_path / "curves.png")[..., :3]
    for gc in ("none", "gc"):
        line = np.array(to_rgb(report.COLORS[gc]))
        assert (np.abs(image - line).max(-1) < 0.02).sum() > 200
        band = report.BAND * line + 1 - report.BAND
        assert (np.abs(image - band).max(-1) < 0.02).sum() > 200


def test_divergence_is_said_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(tmp_path, *QUICK, "--compare", "--seeds", "2", "--lr", "1e30")
    assert result["summary"]["gc"]["train_loss"]["mean"] is None
    assert "2 of 2 runs without centralization and 2 of 2 with gc diverged" in result["verdict"]
    assert {d["is_noise"] for d in result["difference"].values()} == {None}
    assert "nan" in capsys.readouterr().out


def runs_with(gc: str, **measures: list[float]) -> list[Finished]:
    """A run for each value, all else being equal."""
    return [
        Finished(
            gc,
            seed,
            [
                replace(
                    Epoch(1, 0.1, 0.5, 0.6, 0.9, 1.0), **dict(zip(measures, values, strict=True))
                )
            ],
        )
        for seed, values in enumerate(zip(*measures.values(), strict=True))
    ]


def lines(without: dict[str, list[float]], with_gc: dict[str, list[float]]) -> list[str]:
    runs = [*runs_with("none", **without), *runs_with("gc", **with_gc)]
    heading, *said = summary.verdict(runs, "gc").splitlines()
    seeds = len(runs) // 2
    many = f"mean change over {seeds} seeds, paired, and its 95 % confidence interval"
    assert (many if seeds > 1 else "one run without it and one with") in heading
    return said


@pytest.mark.parametrize(
    ("without", "with_gc", "said"),
    [
        ([0.90, 0.91, 0.93], [0.95, 0.96, 0.97], "+4.67 points (+3.23 to +6.10): better."),
        ([0.95, 0.96, 0.98], [0.90, 0.91, 0.92], "-5.33 points (-6.77 to -3.90): worse."),
        (
            [0.90, 0.95, 0.97],
            [0.96, 0.92, 0.97],
            "+1.00 points (-10.38 to +12.38): 3 seeds cannot tell that from noise.",
        ),
        # More than two standard errors, which with two seeds is still nothing.
        (
            [0.90, 0.90],
            [0.91, 0.92],
            "+1.50 points (-4.85 to +7.85): 2 seeds cannot tell that from noise.",
        ),
        # The accuracy on few images has few values.
        (
            [0.90, 0.91, 0.92],
            [0.95, 0.96, 0.97],
            "+5.00 points in each of 3 seeds, which leaves no spread to judge it by.",
        ),
        ([0.90], [0.99], "+9.00 points: one run of each cannot tell that from noise."),
    ],
)
def test_verdict(without: list[float], with_gc: list[float], said: str) -> None:
    (line,) = [
        line
        for line in lines({"test_accuracy": without}, {"test_accuracy": with_gc})
        if line.startswith("Test accuracy")
    ]
    assert line == f"Test accuracy {said}"


def test_each_measure_has_its_own_verdict() -> None:
    """Runs in which one measure is better, one is worse, and one may be either."""
    without = {
        "train_loss": [0.23, 0.24, 0.22],
        "test_loss": [0.30, 0.31, 0.32],
        "test_accuracy": [0.90, 0.91, 0.92],
    }
    with_gc = {
        "train_loss": [0.12, 0.14, 0.12],
        "test_loss": [0.40, 0.42, 0.42],
        "test_accuracy": [0.91, 0.91, 0.90],
    }
    assert lines(without, with_gc) == [
        "Training loss -0.1033 (-0.1177 to -0.0890): better.",
        "Test loss +0.1033 (+0.0890 to +0.1177): worse.",
        "Test accuracy -0.33 points (-4.13 to +3.46): 3 seeds cannot tell that from noise.",
    ]


def test_runs_that_are_the_same() -> None:
    same = {"test_accuracy": [0.9, 0.8]}
    assert lines(same, same) == [
        f"{name}: the same with and without, in each of 2 seeds."
        for name in ("Training loss", "Test loss", "Test accuracy")
    ]


def test_runs_are_paired_by_their_seeds() -> None:
    """In whatever order they were made."""
    runs = [
        *runs_with("none", test_loss=[0.3, 0.5, 0.8]),
        *runs_with("gc", test_loss=[0.2, 0.3, 0.7]),
    ]
    assert summary.differences(runs[::-1], "gc") == summary.differences(runs, "gc")
    mixed = [runs[i] for i in (2, 4, 0, 5, 3, 1)]
    assert summary.verdict(mixed, "gc") == summary.verdict(runs, "gc")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("measure", ["train_loss", "test_loss"])
def test_nothing_is_compared_where_a_run_diverged(measure: str, value: float) -> None:
    runs = [
        *runs_with("none", **{measure: [0.3, 0.4, 0.5]}),
        *runs_with("gc", **{measure: [0.1, value, 0.2]}),
    ]
    assert "0 of 3 runs without centralization and 1 of 3 with gc diverged" in summary.verdict(
        runs, "gc"
    )
    for difference in summary.differences(runs, "gc").values():
        assert (difference.error, difference.interval, difference.is_noise) == (None, None, None)


def test_one_run_is_no_noise_either() -> None:
    difference = summary.difference([0.5], [0.1])
    assert (difference.interval, difference.is_noise) == (None, None)
    assert summary.spread([0.5]).std is None


def test_noise_is_what_a_paired_t_test_says() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        without = rng.normal(0.9, 0.02, size=4)
        with_gc = without + rng.normal(0.01, 0.01, size=4)
        test = stats.ttest_rel(with_gc, without)
        difference = summary.difference(list(with_gc), list(without))
        is_noise = difference.is_noise
        assert is_noise == (test.pvalue >= 0.05)
        assert difference.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
        seen.add(is_noise)
    assert seen == {True, False}
