"""From runs to numbers: means, spreads, and whether a difference is more than noise."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from gcfunc.recipes.train import Finished

QUANTITIES = ("train_loss", "test_loss", "test_accuracy", "step_ms")


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the standard deviation between them (0 for one seed)."""

    mean: float
    std: float


@dataclass(frozen=True)
class Difference:
    """How much a quantity differs between two variants, paired by seed.

    Attributes:
        mean: Mean of the differences.
        error: Standard error of that mean, ``None`` for one seed.
        interval: The 95 % confidence interval of the mean (Student's t), ``None`` for one seed.
    """

    mean: float
    error: float | None
    interval: tuple[float, float] | None

    @property
    def is_noise(self) -> bool:
        """Whether chance between seeds explains it."""
        return self.interval is None or not (self.interval[0] > 0 or self.interval[1] < 0)


def final(run: Finished, quantity: str) -> float:
    """A quantity after the last epoch; the time of a step is the median over all epochs."""
    values = [float(getattr(epoch, quantity)) for epoch in run.history]
    return statistics.median(values) if quantity == "step_ms" else values[-1]


def finals(runs: Sequence[Finished], gc: str, quantity: str) -> list[float]:
    """That quantity of every run of one variant, in the order of the seeds."""
    return [final(run, quantity) for run in runs if run.gc == gc]


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation; not finite, rather than an error, where a run diverged."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, 0.0)
    return Spread(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))


def difference(after: Sequence[float], before: Sequence[float]) -> Difference:
    """``after - before``, seed by seed."""
    pairs = spread([a - b for a, b in zip(after, before, strict=True)])
    if len(after) < 2:
        return Difference(pairs.mean, None, None)
    error = pairs.std / math.sqrt(len(after))
    reach = float(stats.t.ppf(0.975, len(after) - 1)) * error
    return Difference(pairs.mean, error, (pairs.mean - reach, pairs.mean + reach))


def verdict(runs: Sequence[Finished], gc: str) -> str:
    """What centralization did to the accuracy on held-out images, in a sentence."""
    diverged = {
        variant: sum(not math.isfinite(loss) for loss in finals(runs, variant, "train_loss"))
        for variant in ("none", gc)
    }
    without, with_gc = (finals(runs, variant, "test_accuracy") for variant in ("none", gc))
    seeds = len(without)
    if any(diverged.values()):
        return (
            f"{diverged['none']} of {seeds} runs without centralization and {diverged[gc]} of "
            f"{seeds} with {gc} diverged, so accuracies are not compared; try a smaller --lr."
        )
    accuracy = difference(with_gc, without)
    points = f"{100 * accuracy.mean:+.2f}"
    if accuracy.error is None or accuracy.interval is None:
        return (
            f"With {gc} the test accuracy changes by {points} points; "
            "one seed cannot tell that from noise."
        )
    measured = (
        f"With {gc} the test accuracy changes by {points} ± {100 * accuracy.error:.2f} points "
        f"(mean ± standard error over {seeds} seeds)"
    )
    if accuracy.is_noise:
        return (
            f"{measured}: within noise, so with these settings it makes no measurable difference."
        )
    low, high = (f"{100 * bound:+.2f}" for bound in accuracy.interval)
    what = "helps" if accuracy.mean > 0 else "hurts"
    return f"{measured}, 95 % confidence {low} to {high}: with these settings it {what}."
