"""Comparing what candidates answer to rows that were held out of their training.

All answer the same rows, so that differences are paired. An interval holds for other rows and
these runs; folds share training rows, so that it is somewhat too narrow (Bengio and Grandvalet,
JMLR 2004: the variance of cross-validation has no unbiased estimator).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2lora.data.reading import TaskData
from d2lora.evaluation.counts import Column, per_row
from d2lora.evaluation.crossed import Array
from d2lora.evaluation.metrics import main_column
from d2lora.evaluation.outputs import columns_of_outputs
from d2lora.evaluation.stats import Difference, Interval, difference_of, interval_of, mean_interval


@dataclass(frozen=True)
class Answers:
    """The scores of all n rows, each answered without having been trained on."""

    losses: Array
    """Nats per token of each row's completion, shape (I,)."""
    columns: Mapping[str, Column]
    """Scores by the task's metrics; none where it has no answers to score."""
    outputs: Sequence[str] = ()
    """What was answered; none where several runs are one."""

    @property
    def loss(self) -> float:
        """The mean over rows."""
        return float(self.losses.mean())

    @property
    def main(self) -> Column | None:
        """The task's main score."""
        return self.columns[main_column(tuple(self.columns))] if self.columns else None

    @property
    def score(self) -> Interval | None:
        """The task's main score with its 95 % CI."""
        return None if self.main is None else interval_of(self.main)

    def change_from(self, other: "Answers") -> Difference | None:
        """Return how much higher the main score is than another's."""
        if self.main is None or other.main is None:
            return None
        return difference_of(other.main, self.main)

    def beats(self, other: "Answers") -> bool:
        """Say whether this is the better candidate.

        By the task's own score where it can tell: where the interval of the difference leaves out
        zero. Else by the loss, which tells more from few rows.
        """
        change = self.change_from(other)
        if change is not None and (change.low > 0 or change.high < 0):
            return change.low > 0
        return self.loss < other.loss


def of_folds(data: TaskData, results: Sequence[Mapping[str, Any]]) -> Answers:
    """Return the scores of runs that together left out every row; the first answer of each counts.

    Args:
        data: The n rows.
        results: `places`, `outputs` and `losses` of each run.
    """
    outputs: dict[int, str] = {}
    losses: dict[int, float] = {}
    for result in results:
        losses = dict(zip(result["places"], result["losses"], strict=True)) | losses
        outputs = dict(zip(result["places"], result["outputs"], strict=False)) | outputs
    places = range(len(data.examples))
    by_row = np.array([losses[place] for place in places])
    if not data.task.metrics:
        return Answers(by_row, {})
    said = [outputs[place] for place in places]
    return Answers(by_row, columns_of_outputs(data, said), said)


def mean_of(many: Sequence[Answers]) -> Answers:
    """Return the scores of the average run among several of one kind."""
    losses = np.array([one.losses for one in many]).mean(axis=0)
    names = many[0].columns
    if len(many) == 1:
        return many[0]
    return Answers(
        losses,
        {n: np.array([per_row(one.columns[n]) for one in many]).mean(axis=0) for n in names},
    )


@dataclass(frozen=True)
class LearningCurve:
    """Scores after training on fewer of the rows, and the line through them."""

    sizes: list[float]
    """Rows trained on, ascending."""
    scores: list[Interval]
    """The main score, or where there is none minus the loss, of all n rows."""
    per_doubling: Interval
    """What twice the rows brought, by least squares on log2 of the rows."""
    twice: Interval
    """The line's value at twice the largest size, if it goes on."""

    @classmethod
    def of(cls, sizes: Sequence[float], answers: Sequence[Answers]) -> "LearningCurve":
        """Fit the line; its intervals are over rows, which answered at every size."""
        values = np.array([-a.losses if a.main is None else per_row(a.main) for a in answers])
        x = np.log2(np.array(sizes, dtype=float))
        centred = x - x.mean()
        slope_by_row = centred @ values / (centred @ centred)
        ahead = x.max() + 1 - x.mean()
        return cls(
            list(sizes),
            [mean_interval(row) for row in values],
            mean_interval(slope_by_row),
            mean_interval(values.mean(axis=0) + ahead * slope_by_row),
        )
