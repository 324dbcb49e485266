"""Intervals and paired differences. Pure functions of scores and a seed.

Shapes: S seeds (runs), I items (test questions), K counts of an item, N sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from d2lora.evaluation.counts import Column, Counts, per_row
from d2lora.evaluation.crossed import (
    CONFIDENCE,
    NO_VERDICT,
    ROUNDING,
    Array,
    clipped,
    crossed_spread,
    of_three,
    verdict_of,
    within_0_and_1,
)

N_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % CI."""

    mean: float
    low: float
    high: float
    n_items: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its intervals, and its spread over seeds."""

    mean: float
    low: float
    """Of the 95 % CI over items alone, with these seeds."""
    high: float
    over_seeds: tuple[float, float] | None
    """95 % CI over items and seeds; None with one seed."""
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
        """`helps`, `hurts` or `no difference seen`: what the interval over items and seeds says.

        With one seed there is no verdict.
        """
        return NO_VERDICT if self.over_seeds is None else verdict_of(*self.over_seeds)


def mean_interval(scores: Array, seed: int = 0) -> Interval:
    """Return the mean of scores of independent items with a 95 % CI.

    Right-or-wrong scores take Wilson's interval, which stays honest where all are right or all
    wrong; others the percentile bootstrap over items.

    Args:
        scores: Shape (I,), at least one item.
        seed: Seed of the bootstrap.
    """
    mean, n = float(scores.mean()), len(scores)
    if _right_or_wrong(scores):
        from scipy import stats  # half a second, which a training run need not spend

        interval = stats.binomtest(int(scores.sum()), n).proportion_ci(CONFIDENCE, "wilson")
        return Interval(mean, float(interval.low), float(interval.high), n)
    low, high = _bootstrap(scores, seed)
    return Interval(mean, low, high, n)


def interval_of(column: Column, seed: int = 0) -> Interval:
    """Return one score of all rows with a 95 % CI.

    Of counts it is the percentile bootstrap of what their sums give, and Wilson's where all
    rows are right or all are wrong.

    Args:
        column: Of independent rows, at least one.
        seed: Seed of the bootstrap.
    """
    if not isinstance(column, Counts):
        return mean_interval(column, seed)
    shares = column.shares()
    if _right_or_wrong(shares):
        return mean_interval(shares, seed)
    low, high = _bootstrap(_sparse(column.rows), seed, column.of_sums)
    return Interval(column.score, low, high, len(shares))


def difference_of(first: Column, second: Column, seed: int = 0) -> Difference:
    """Return how much higher the second adapter scores than the first on the same rows.

    Args:
        first: One score of the rows.
        second: The same score of the same rows.
        seed: Seed of the bootstrap.
    """
    shares, others = per_row(first), per_row(second)
    difference = paired_difference(shares[None], others[None], seed)
    if not (isinstance(first, Counts) and isinstance(second, Counts)) or (shares == others).all():
        return difference
    n_first = first.rows.shape[1]

    def change(sums: Array) -> Array:
        return second.of_sums(sums[:, n_first:]) - first.of_sums(sums[:, :n_first])

    low, high = _bootstrap(_sparse(np.hstack([first.rows, second.rows])), seed, change)
    return replace(difference, low=low, high=high)


def paired_difference(first: Array, second: Array, seed: int = 0) -> Difference:
    """Return how much higher the second arm scores than the first.

    Both arms answer the same items with the same seeds. Items are resampled with all their
    seeds kept together, so that the interval holds for other items and these seeds: these draws
    of task rows, orders and random weights. `over_seeds` holds for other seeds, too. Where all
    items differ alike, or not at all, the interval is that of the rule of three: with 95 %
    confidence fewer than 3 of I items would do otherwise, by as much as there is room for. Where
    all scores lie from 0 to 1, no interval leaves -1 to 1.

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
        low, high = of_three(float(by_item[0]), n_items)
    else:
        low, high = _bootstrap(by_item, seed)
    by_seed = by_seed_and_item.mean(axis=1)
    seed_sd = float(by_seed.std(ddof=1)) if n_seeds > 1 else None
    mean = float(by_item.mean())
    over_seeds = None
    if n_seeds > 1:
        margin = crossed_spread(by_seed_and_item).margin
        over_seeds = min(low, mean - margin), max(high, mean + margin)
        if within_0_and_1(first) and within_0_and_1(second):
            over_seeds = clipped(*over_seeds)
    return Difference(
        mean, low, high, over_seeds, seed_sd, tuple(by_seed.tolist()), n_items, n_seeds
    )


def difference_p(first: Array, second: Array, seed: int = 0) -> float:
    """Return the two-sided p-value of "both arms are the same", over items and seeds.

    The larger of two: that of the interval over items and seeds, and that of sign flips of items.
    With one seed there is the second alone.

    Args:
        first: Scores, shape (S, I).
        second: Scores, shape (S, I).
        seed: Seed of the flips.
    """
    flipped = permutation_p(first, second, seed)
    if len(first) == 1:
        return flipped
    differences = second - first
    return max(flipped, crossed_spread(differences).p_value(float(differences.mean())))


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


def _right_or_wrong(scores: Array) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _sparse(counts: Array) -> Any:
    """Return counts in the form in which many of them are summed quickly: most are 0."""
    from scipy.sparse import csr_array

    return csr_array(counts)


def _bootstrap(
    rows: Any, seed: int, of_sums: Callable[[Array], Array] | None = None
) -> tuple[float, float]:
    """Percentile interval of the mean, in blocks so that memory stays small.

    Args:
        rows: Values, shape (I,), or counts, shape (I, K).
        seed: Seed of the resampling.
        of_sums: What the sums of resampled counts give.
    """
    generator = np.random.default_rng(seed)
    n = rows.shape[0]
    weights = np.full(n, 1 / n)
    block = max(1, 2_000_000 // max(rows.shape))
    scores: list[Array] = []
    for begin in range(0, N_RESAMPLES, block):
        times = generator.multinomial(n, weights, size=min(block, N_RESAMPLES - begin))
        sums = times @ rows
        scores.append(sums / n if of_sums is None else of_sums(sums))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(scores), [tail, 100 - tail])
    return float(low), float(high)
