"""Intervals and paired differences. Pure functions of scores and a seed.

Shapes: S seeds (runs), I items (test questions).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
N_RESAMPLES = 10_000
NOTHING_SEEN = "no difference seen"
ROUNDING = 1e-12
"""A difference of means no larger than this is none."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    n_items: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95 % interval over items, and its spread over seeds."""

    mean: float
    low: float
    high: float
    over_seeds: tuple[float, float] | None
    """95 % interval that speaks of other seeds as well as of other items; None with one seed."""
    seed_sd: float | None
    """Standard deviation of the difference over seeds; None with one seed."""
    by_seed: tuple[float, ...]
    """The difference of each seed."""
    n_items: int
    n_seeds: int

    @property
    def n_above(self) -> int:
        """Seeds in which the second arm scores higher."""
        return sum(value > ROUNDING for value in self.by_seed)

    @property
    def n_below(self) -> int:
        """Seeds in which the second arm scores lower."""
        return sum(value < -ROUNDING for value in self.by_seed)

    @property
    def n_equal(self) -> int:
        """Seeds in which both score the same."""
        return self.n_seeds - self.n_above - self.n_below

    @property
    def verdict(self) -> str:
        """`helps`, `hurts` or `no difference seen`: what the interval over items lets one say."""
        return _verdict(self.low, self.high)

    @property
    def holds_for_other_seeds(self) -> bool:
        """Whether the interval over items and seeds says what that over items says."""
        return self.over_seeds is not None and _verdict(*self.over_seeds) == self.verdict


def _verdict(low: float, high: float) -> str:
    if low > 0:
        return "helps"
    return "hurts" if high < 0 else NOTHING_SEEN


def mean_interval(scores: Array, seed: int = 0) -> Interval:
    """Return the mean of scores of independent items with a 95 % interval.

    Right-or-wrong scores take Wilson's interval, which stays honest where all are right or all
    wrong; others the percentile bootstrap over items.

    Args:
        scores: Shape (I,), at least one item.
        seed: Seed of the bootstrap.
    """
    mean, n = float(scores.mean()), len(scores)
    if np.isin(scores, (0.0, 1.0)).all():
        from scipy import stats  # half a second, which a training run need not spend

        interval = stats.binomtest(int(scores.sum()), n).proportion_ci(CONFIDENCE, "wilson")
        return Interval(mean, float(interval.low), float(interval.high), n)
    low, high = _bootstrap(scores, seed)
    return Interval(mean, low, high, n)


def paired_difference(first: Array, second: Array, seed: int = 0) -> Difference:
    """Return how much higher the second arm scores than the first.

    Both arms answer the same items with the same seeds. Items are resampled with all their
    seeds kept together, so that the interval speaks of other items and these seeds: these draws
    of task rows, orders and random weights. `over_seeds` speaks of others, too. Where no item
    differs at all the interval is that of the rule of three: with 95 % confidence fewer than 3 of I
    items would differ.

    Args:
        first: Scores, shape (S, I).
        second: Scores, shape (S, I).
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the shapes differ or hold no item.
    """
    if first.shape != second.shape or first.ndim != 2 or first.size == 0:
        raise ValueError(f"expected two equal shapes (S, I), got {first.shape}, {second.shape}")
    by_seed_and_item = second - first
    by_item = by_seed_and_item.mean(axis=0)
    n_seeds, n_items = by_seed_and_item.shape
    if (by_item == by_item[0]).all():
        margin = min(1.0, 3.0 / n_items)
        low, high = float(by_item[0]) - margin, float(by_item[0]) + margin
    else:
        low, high = _bootstrap(by_item, seed)
    by_seed = by_seed_and_item.mean(axis=1)
    seed_sd = float(by_seed.std(ddof=1)) if n_seeds > 1 else None
    mean = float(by_item.mean())
    over_seeds = None
    if n_seeds > 1:
        margin = _crossed_margin(by_seed_and_item)
        over_seeds = min(low, mean - margin), max(high, mean + margin)
    return Difference(
        mean, low, high, over_seeds, seed_sd, tuple(by_seed.tolist()), n_items, n_seeds
    )


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


def _crossed_margin(values: Array) -> float:
    """Return half the 95 % interval of a mean over items and seeds, both drawn at random.

    The variance of the mean is item / I + seed / S + rest / (I S); its degrees of freedom are
    Satterthwaite's (1946), which go to S - 1 where seeds decide and to I - 1 where items do.

    Args:
        values: Shape (S, I), at least two seeds.
    """
    from scipy import stats

    n_seeds, n_items = values.shape
    parts = _Parts.of(values)
    rest = parts.rest / (n_items * n_seeds)
    of_items, of_seeds = parts.item / n_items + rest, parts.seed / n_seeds
    variance = of_items + of_seeds
    if not variance:
        return 0.0
    freedom = variance**2 / (
        of_items**2 / max(1, n_items - 1) + (of_seeds + rest) ** 2 / (n_seeds - 1)
    )
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / 2, freedom)
    return float(quantile * math.sqrt(variance))


def permutation_p(first: Array, second: Array, seed: int = 0) -> float:
    """Return the two-sided p-value of "both arms are the same" by sign flips of items.

    Under the hypothesis an item's paired difference is as likely to have the other sign; an item
    flips with all its seeds (paired permutation test, Good 2005, section 3.2). Random flips, with
    the observed one counted in, so that p is never 0 (Phipson and Smyth 2010).

    Args:
        first: Scores, shape (S, I).
        second: Scores, shape (S, I).
        seed: Seed of the flips.
    """
    by_item = (second - first).mean(axis=0)
    moved = by_item[by_item != 0]
    if len(moved) == 0:
        return 1.0
    generator = np.random.default_rng(seed)
    observed = abs(moved.sum()) * (1 - 1e-12)  # as extreme as itself, whatever the rounding
    extreme = 0
    block = max(1, 2_000_000 // len(moved))
    for begin in range(0, N_RESAMPLES, block):
        signs = generator.integers(0, 2, (min(block, N_RESAMPLES - begin), len(moved))) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= observed).sum())
    return (extreme + 1) / (N_RESAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for a family of tests (Holm 1979), in the given order."""
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


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
    first and the last, more seeds the last two. None where nothing varies, as then nothing can be
    foretold. One seed tells nothing of other seeds, and they are taken to be alike.

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
    quantile = NormalDist().inv_cdf
    z = quantile(1 - (1 - CONFIDENCE) / 2) + quantile(0.8)
    wanted = (effect / z) ** 2
    items = _enough(parts.item + parts.rest / n_seeds, wanted - parts.seed / n_seeds)
    seeds = _enough(parts.seed + parts.rest / n_items, wanted - parts.item / n_items)
    return Power(effect, items, seeds)


def _enough(variance: float, allowed: float) -> float:
    """Return how many it takes to average a variance down to what is allowed."""
    return max(1, math.ceil(variance / allowed)) if allowed > 0 else math.inf


def _bootstrap(values: Array, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean, in blocks so that memory stays small."""
    generator = np.random.default_rng(seed)
    n = len(values)
    weights = np.full(n, 1 / n)
    block = max(1, 2_000_000 // n)
    means: list[Array] = []
    for begin in range(0, N_RESAMPLES, block):
        counts = generator.multinomial(n, weights, size=min(block, N_RESAMPLES - begin))
        means.append(counts @ values / n)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)
