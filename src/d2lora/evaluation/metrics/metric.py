"""What a metric is: a function of outputs and right answers that gives every row a score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from d2lora.evaluation.counts import Column, per_row

Scores = dict[str, float]


class Scored(NamedTuple):
    """What a metric sees of one test row."""

    output: str
    """What the model generated, or the label chosen."""
    target: str
    """The gold answer."""
    references: tuple[str, ...]
    """All right answers, the target first; at least one."""
    row: Mapping[str, Any]
    """The row as it was read."""


Measure = Callable[[Sequence[Scored]], dict[str, Column]]


@dataclass(frozen=True)
class Metric:
    """A metric by its name in a card; 1.0 is best, 0.0 worst."""

    name: str
    title: str
    """Name of the main score in reports."""
    columns: tuple[str, ...]
    """Names of its scores, the main one first."""
    measure: Measure
    """From test rows, at least one, to each score, either as values of rows or as counts."""
    extra: str | None = None
    """Extra that it needs."""

    def score(self, scored: Sequence[Scored]) -> dict[str, list[float]]:
        """Return a value per row of each score; the mean over rows is the score."""
        return {name: per_row(column).tolist() for name, column in self.measure(scored).items()}


def of_each_row(score: Callable[[Scored], Scores]) -> Measure:
    """Return the measure that scores rows one by one."""

    def measure(scored: Sequence[Scored]) -> dict[str, Column]:
        rows = [score(one) for one in scored]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    return measure


def of_best_reference(score: Callable[[str, str], Scores]) -> Measure:
    """Return the measure that scores rows one by one, each score by its best reference.

    Args:
        score: From an output and one right answer to scores.
    """

    def best(scored: Scored) -> Scores:
        found = [score(scored.output, reference) for reference in scored.references]
        return {name: max(scores[name] for scores in found) for name in found[0]}

    return of_each_row(best)
