"""What ``gcfunc train`` reports."""

import re
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
    assert "nan" in capsys.readouterr().out


def runs_with(gc: str, accuracies: list[float]) -> list[Finished]:
    return [
        Finished(gc, seed, [Epoch(1, 0.1, 0.5, 0.5, accuracy, 1.0)])
        for seed, accuracy in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("without", "with_gc", "said"),
    [
        ([0.90, 0.91, 0.92], [0.95, 0.96, 0.97], r"\+5\.00 ± 0\.00 .* it helps\.$"),
        ([0.95, 0.96, 0.98], [0.90, 0.91, 0.92], r"-5\.33 ± 0\.33 .* it hurts\.$"),
        ([0.90, 0.95, 0.97], [0.96, 0.92, 0.97], r"within noise, so .* no measurable difference"),
        ([0.90, 0.90], [0.90, 0.90], r"\+0\.00 ± 0\.00 .* within noise"),
        # More than two standard errors, which with two seeds is still nothing.
        ([0.90, 0.90], [0.91, 0.92], r"\+1\.50 ± 0\.50 .* within noise"),
        ([0.90], [0.99], r"\+9\.00 points; one seed cannot tell"),
    ],
)
def test_verdict(without: list[float], with_gc: list[float], said: str) -> None:
    verdict = summary.verdict([*runs_with("none", without), *runs_with("gc", with_gc)], "gc")
    assert re.search(said, verdict)


def test_noise_is_what_a_paired_t_test_says() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        without = rng.normal(0.9, 0.02, size=4)
        with_gc = without + rng.normal(0.01, 0.01, size=4)
        p = stats.ttest_rel(with_gc, without).pvalue
        is_noise = summary.difference(list(with_gc), list(without)).is_noise
        assert is_noise == (p >= 0.05)
        seen.add(is_noise)
    assert seen == {True, False}
