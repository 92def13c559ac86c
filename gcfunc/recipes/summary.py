"""From runs to numbers: means, spreads, and which differences are more than noise."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from gcfunc.recipes.train import Finished

CONFIDENCE = 0.95
# Of values that are all alike, rounding leaves a spread.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Quantity:
    """What is measured of a run.

    Attributes:
        name: In words.
        heading: Above its column, unit included.
        unit: After a change of it.
        factor: From the value to what is shown.
        digits: How many decimals are shown.
        more_is_better: Whether it should be large.
        learned: Whether it tells what the network learned, and nothing of the machine.
    """

    name: str
    heading: str
    unit: str = ""
    factor: float = 1
    digits: int = 4
    more_is_better: bool = False
    learned: bool = True

    def show(self, value: float, sign: str = "") -> str:
        """A value of it, without its unit."""
        return f"{self.factor * value:{sign}.{self.digits}f}"


QUANTITIES = {
    "train_loss": Quantity("training loss", "train loss"),
    "test_loss": Quantity("test loss", "test loss"),
    "test_accuracy": Quantity(
        "test accuracy", "test accuracy, %", " points", factor=100, digits=2, more_is_better=True
    ),
    "step_ms": Quantity("time of a step", "ms a step", " ms", digits=2, learned=False),
}


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the standard deviation between them, ``None`` for one seed."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """How much a quantity differs between two variants, paired by seed.

    Attributes:
        mean: Mean of the differences.
        error: Standard error of that mean, ``None`` where there is none to tell.
        interval: The 95 % confidence interval of the mean by Student's t; ``None`` for one seed,
            where runs diverged, and where all differences are the same, so that there is no spread
            to judge by.
    """

    mean: float
    error: float | None
    interval: tuple[float, float] | None

    @property
    def is_noise(self) -> bool | None:
        """Whether chance between seeds explains it; ``None`` where these seeds cannot tell."""
        return None if self.interval is None else self.interval[0] <= 0 <= self.interval[1]


def final(run: Finished, quantity: str) -> float:
    """A quantity after the last epoch; the time of a step is the median over all epochs."""
    values = [float(getattr(epoch, quantity)) for epoch in run.history]
    return statistics.median(values) if quantity == "step_ms" else values[-1]


def finals(runs: Sequence[Finished], gc: str, quantity: str) -> list[float]:
    """That quantity of every run of one variant, in the order of the seeds."""
    own = sorted((run for run in runs if run.gc == gc), key=lambda run: run.seed)
    return [final(run, quantity) for run in own]


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation; not finite, rather than an error, where a run diverged."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, None)
    return Spread(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))


def difference(after: Sequence[float], before: Sequence[float]) -> Difference:
    """``after - before``, seed by seed."""
    pairs = spread([a - b for a, b in zip(after, before, strict=True)])
    if pairs.std is None or not math.isfinite(pairs.std):
        return Difference(pairs.mean, None, None)
    if pairs.std <= _ROUNDING * max(map(abs, [*after, *before])):
        return Difference(pairs.mean, 0.0, None)
    error = pairs.std / math.sqrt(len(after))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(after) - 1)) * error
    return Difference(pairs.mean, error, (pairs.mean - reach, pairs.mean + reach))


def differences(runs: Sequence[Finished], gc: str) -> dict[str, Difference]:
    """What centralization changed in each quantity; means alone, where a run diverged."""
    found = {q: difference(finals(runs, gc, q), finals(runs, "none", q)) for q in QUANTITIES}
    if not any(_diverged(run) for run in runs):
        return found
    return {q: Difference(each.mean, None, None) for q, each in found.items()}


def verdict(runs: Sequence[Finished], gc: str) -> str:
    """What centralization did to what was learned, a line for each measure of it."""
    seeds = sum(run.gc == gc for run in runs)
    diverged = {
        variant: sum(_diverged(run) for run in runs if run.gc == variant)
        for variant in ("none", gc)
    }
    if any(diverged.values()):
        return (
            f"{diverged['none']} of {seeds} runs without centralization and {diverged[gc]} of "
            f"{seeds} with {gc} diverged, so nothing is compared; try a smaller --lr."
        )
    found = differences(runs, gc)
    lines = [_line(QUANTITIES[q], d, seeds) for q, d in found.items() if QUANTITIES[q].learned]
    how = (
        f"mean change over {seeds} seeds, paired, and its 95 % confidence interval by Student's t"
        if seeds > 1
        else "change between one run without it and one with"
    )
    return "\n".join([f"With {gc}, {how}:", *lines])


def _line(quantity: Quantity, difference: Difference, seeds: int) -> str:
    """What happened to one quantity, in words."""
    name = quantity.name.capitalize()
    change = f"{quantity.show(difference.mean, '+')}{quantity.unit}"
    if seeds == 1:
        return f"{name} {change}: one run of each cannot tell that from noise."
    if difference.interval is None:
        if difference.mean == 0:
            return f"{name}: the same with and without, in each of {seeds} seeds."
        return f"{name} {change} in each of {seeds} seeds, which leaves no spread to judge it by."
    low, high = (quantity.show(bound, "+") for bound in difference.interval)
    if difference.is_noise:
        what = f"{seeds} seeds cannot tell that from noise"
    else:
        what = "better" if (difference.mean > 0) == quantity.more_is_better else "worse"
    return f"{name} {change} ({low} to {high}): {what}."


def _diverged(run: Finished) -> bool:
    return not all(math.isfinite(final(run, q)) for q, what in QUANTITIES.items() if what.learned)
