"""Intervals and paired differences. Pure functions of scores and a seed.

Shapes: S seeds (runs), I items (test questions).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
CONFIDENCE = 0.95
N_RESAMPLES = 10_000


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
    seed_sd: float | None
    """Standard deviation of the difference over seeds; None with one seed."""
    n_items: int
    n_seeds: int

    @property
    def verdict(self) -> str:
        """`helps`, `hurts` or `no difference seen`: what the interval lets one say."""
        if self.low > 0:
            return "helps"
        return "hurts" if self.high < 0 else "no difference seen"


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
        interval = stats.binomtest(int(scores.sum()), n).proportion_ci(CONFIDENCE, "wilson")
        return Interval(mean, float(interval.low), float(interval.high), n)
    low, high = _bootstrap(scores, seed)
    return Interval(mean, low, high, n)


def paired_difference(first: Array, second: Array, seed: int = 0) -> Difference:
    """Return how much higher the second arm scores than the first.

    Both arms answer the same items with the same seeds. Items are resampled with all their
    seeds kept together, so that the interval speaks of other items; the spread over seeds is
    given apart. Where no item differs at all the interval is that of the rule of three: with
    95 % confidence fewer than 3 of I items would differ.

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
    return Difference(float(by_item.mean()), low, high, seed_sd, n_items, n_seeds)


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
