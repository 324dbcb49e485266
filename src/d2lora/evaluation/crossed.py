"""Variance of a difference over items and seeds, both drawn at random.

Shapes: S seeds (runs), I items (test questions), N sizes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
NOTHING_SEEN = "no difference seen"
NO_VERDICT = "no verdict from one seed"
ROUNDING = 1e-12
"""A difference of means no larger than this is none."""


def verdict_of(low: float, high: float) -> str:
    """Return the verdict of a 95 % CI of a difference."""
    if low > 0:
        return "helps"
    return "hurts" if high < 0 else NOTHING_SEEN


def within_0_and_1(scores: Array) -> bool:
    """Say whether all scores lie on the scale that tables show in percent."""
    return bool(((scores >= 0) & (scores <= 1)).all())


def clipped(low: float, high: float) -> tuple[float, float]:
    """Return what of the interval of a difference of such scores can be: it covers as often."""
    return max(-1.0, low), min(1.0, high)


def of_three(difference: float, n_items: int) -> tuple[float, float]:
    """Return the 95 % CI of a mean difference that all items share, by the rule of three.

    Fewer than 3 of I items would do otherwise, and these may go as far as -1 or 1, or as far as
    what was seen.
    """
    share, furthest = min(1.0, 3.0 / n_items), max(1.0, abs(difference))
    low = difference - share * (furthest + difference)
    return low, difference + share * (furthest - difference)


@dataclass(frozen=True)
class _Parts:
    """Variances of a crossed table of items and seeds, by the analysis of variance."""

    item: float
    """Of what an item adds, whatever the seed."""
    seed: float
    """Of what a seed adds, whatever the item."""
    rest: float
    """Of what is left."""

    @classmethod
    def of(cls, values: Array) -> "_Parts":
        """Part the variance of values, shape (S, I); one seed leaves all to the items."""
        n_seeds, n_items = values.shape
        by_item, by_seed = values.mean(axis=0), values.mean(axis=1)
        item = float(by_item.var(ddof=1)) if n_items > 1 else 0.0
        if n_seeds == 1:
            return cls(item, 0.0, 0.0)
        rest = 0.0
        if n_items > 1:
            left = values - by_item - by_seed[:, None] + values.mean()
            rest = float((left**2).sum()) / ((n_seeds - 1) * (n_items - 1))
        seed = float(by_seed.var(ddof=1))
        return cls(max(0.0, item - rest / n_seeds), max(0.0, seed - rest / n_items), rest)

    def spread(self, n_seeds: float, n_items: float) -> "Spread":
        """Return the spread of the mean of a table of so many seeds, at least two, and items."""
        rest = self.rest / (n_items * n_seeds)
        of_items, of_seeds = self.item / n_items + rest, self.seed / n_seeds
        variance = of_items + of_seeds
        if not variance:
            return Spread(0.0, 1.0)
        freedom = variance**2 / (
            of_items**2 / max(1, n_items - 1) + (of_seeds + rest) ** 2 / (n_seeds - 1)
        )
        return Spread(variance, freedom)


@dataclass(frozen=True)
class Spread:
    """The variance of a mean, with Satterthwaite's (1946) degrees of freedom."""

    variance: float
    freedom: float

    @classmethod
    def of(cls, parts: Sequence[tuple[float, float]]) -> "Spread":
        """Add independent parts: each its variance, and the degrees of freedom it is known by."""
        variance = sum(part for part, _ in parts)
        if not variance:
            return cls(0.0, 1.0)
        return cls(variance, variance**2 / sum(part**2 / max(1.0, n) for part, n in parts))

    @property
    def margin(self) -> float:
        """Half the 95 % CI of the mean."""
        from scipy import stats

        quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / 2, self.freedom)
        return float(quantile * math.sqrt(self.variance))

    def p_value(self, mean: float) -> float:
        """Return the two-sided p-value of a mean against 0."""
        from scipy import stats

        if not self.variance:
            return 1.0 if abs(mean) <= ROUNDING else 0.0
        return float(2 * stats.t.sf(abs(mean) / math.sqrt(self.variance), self.freedom))

    def power(self, effect: float) -> float:
        """Return how often a 5 % test sees a mean of that size (noncentral t)."""
        from scipy import stats

        if not self.variance:
            return 1.0
        quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / 2, self.freedom)
        return float(stats.nct.sf(quantile, self.freedom, effect / math.sqrt(self.variance)))


def crossed_spread(values: Array) -> Spread:
    """Return the spread of a mean over items and seeds, both drawn at random.

    Its variance is item / I + seed / S + rest / (I S); the degrees of freedom go to S - 1 where
    seeds decide and to I - 1 where items do.

    Args:
        values: Shape (S, I), at least two seeds.
    """
    return _Parts.of(values).spread(*values.shape)


@dataclass(frozen=True)
class Pooled:
    """The mean difference over all tasks and sizes of a study."""

    mean: float
    interval: tuple[float, float] | None
    """95 % CI over items and seeds; None with one seed."""
    p_value: float | None
    """Two-sided, against 0; None with one seed."""
    n_cells: int
    """Tasks x sizes that it is the mean of."""
    n_seeds: int

    @property
    def verdict(self) -> str:
        """`helps`, `hurts` or `no difference seen`: what the interval says."""
        return NO_VERDICT if self.interval is None else verdict_of(*self.interval)


def pooled_difference(tasks: Sequence[Array], *, from_0_to_1: bool = False) -> Pooled:
    """Return the mean of paired differences over tasks and sizes, each counting the same.

    A seed draws the rows, order and random weights of every size and task, so seeds are the units
    that repeat: the spread of their means, with S - 1 degrees of freedom, holds whatever the sizes
    have in common. Items are shared by sizes and seeds; what they add lastingly comes on top.

    Args:
        tasks: Differences of each task, shape (N, S, I): sizes, seeds, items. S is the same for
            all; of means over items I is 1.
        from_0_to_1: Whether they are of scores from 0 to 1, so that none can be beyond -1 and 1.
    """
    n_cells = sum(len(task) for task in tasks)
    by_seed = np.concatenate([task.mean(axis=2) for task in tasks]).mean(axis=0)
    mean, n_seeds = float(by_seed.mean()), len(by_seed)
    if n_seeds == 1:
        return Pooled(mean, None, None, n_cells, n_seeds)
    parts = [(float(by_seed.var(ddof=1)) / n_seeds, n_seeds - 1.0)]
    for task in tasks:
        n_items = task.shape[2]
        share = len(task) / n_cells
        lasting = _Parts.of(task.mean(axis=0)).item
        parts.append((share**2 * lasting / n_items, n_items - 1.0))
    spread = Spread.of(parts)
    margin = spread.margin
    interval = mean - margin, mean + margin
    if not spread.variance:
        interval = of_three(mean, sum(task.shape[2] for task in tasks))
    if from_0_to_1:
        interval = clipped(*interval)
    return Pooled(mean, interval, spread.p_value(mean), n_cells, n_seeds)


@dataclass(frozen=True)
class Power:
    """What it would take to see a difference of a given size, four times out of five."""

    effect: float
    n_items: float
    """Test items needed with the present number of seeds; infinite where no number is enough."""
    n_seeds: float
    """Seeds needed with the present items; infinite where no number is enough."""


def power(first: Array, second: Array, effect: float = 0.01) -> Power | None:
    """Return how many items or seeds a 5 % test needs to see `effect` with 80 % power.

    The test is one over items and seeds. The variance of a difference is parted into what an item
    adds, what a seed adds and the rest (two-way analysis of variance); more items average out the
    first and the last, more seeds the last two. From few seeds it is a rough estimate. None where
    nothing varies, as then nothing can be estimated. With one seed, all seeds are assumed to be
    alike, and the test is that of two.

    Args:
        first: Scores, shape (S, I).
        second: Scores, shape (S, I).
        effect: Difference to be seen, on the scale of the scores.
    """
    differences = second - first
    n_seeds, n_items = differences.shape
    if n_items < 2 or not differences.mean(axis=0).var():
        return None
    parts = _Parts.of(differences)
    items = _enough(lambda n: parts.spread(max(2, n_seeds), n).power(effect))
    seeds = _enough(lambda n: parts.spread(n, n_items).power(effect))
    return Power(effect, items, seeds)


_WANTED = 0.8
_MANY = 2**40
"""What more items or seeds than this do not show, no number does."""


def _enough(power_of: Callable[[int], float]) -> float:
    """Return the smallest number, from 2 on, at which the power is what is wanted."""
    high = 2
    while power_of(high) < _WANTED:
        if high >= _MANY:
            return math.inf
        high *= 2
    low = high // 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= _WANTED else (middle, high)
    return high
