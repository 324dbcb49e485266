"""Scores that are no means of rows, such as macro F1: functions of counts summed over rows.

Shapes: I rows, K counts of a row, N sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from d2lora.evaluation.crossed import Array


@dataclass(frozen=True)
class Counts:
    """What each row adds to the sums that a score is computed of."""

    rows: Array
    """Shape (I, K), at least one row."""
    of_sums: Callable[[Array], Array]
    """From sums over rows, shape (N, K), to scores, shape (N,)."""

    @property
    def score(self) -> float:
        """The score of all rows together."""
        return float(self.of_sums(self.rows.sum(axis=0)[None])[0])

    def shares(self) -> Array:
        """Return the share that each row has in the score, shape (I,).

        Jackknife pseudo-values, I times the score of all rows less I - 1 times that without the
        row, shifted so that their mean is the score (Efron 1982, chapter 3). The variance of their
        mean is the jackknife's of the score, which on average is not below the true one (Efron and
        Stein 1981), so shares stand for scores of rows wherever those are compared. A single share
        may be below 0 or above 1. The shares of a mean are the values that it is the mean of.
        """
        n, score = len(self.rows), self.score
        without = self.of_sums(self.rows.sum(axis=0) - self.rows)
        return score + (n - 1) * (without.mean() - without)


Column = Array | Counts
"""One score of a metric: a value per row, of which it is the mean, or counts per row."""


def per_row(column: Column) -> Array:
    """Return a value per row whose mean is the score, shape (I,)."""
    return column.shares() if isinstance(column, Counts) else column


def f1_counts(found: Sequence[set[str]], wanted: Sequence[set[str]]) -> Counts:
    """Return the counts of F1 over all rows together: what was found, of what was wanted."""
    pairs = zip(found, wanted, strict=True)
    return Counts(np.array([[len(f & w), len(f) + len(w)] for f, w in pairs], dtype=float), _f1)


def _f1(sums: Array) -> Array:
    return ratio(2 * sums[:, 0], sums[:, 1])


def ratio(part: Array, whole: Array) -> Array:
    """Divide; where there is nothing to divide by the result is 0, as in scikit-learn."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
