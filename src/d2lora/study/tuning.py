"""Which learning rate and length a run takes: a search over a grid, by validation losses alone.

All learning rates of the grid are tried at the plan's longest length. From the best one the search
goes on: to a learning rate beyond the grid where the best lies at its edge, to twice the steps,
there at a lower learning rate, too, where the lowest loss is the last one. It ends where no
neighbour of the best is left to try.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Curve = tuple[tuple[int, float], ...]
"""(optimizer step, validation loss), in order of steps."""
BEYOND = 2
"""Learning rates that may be tried beyond each end of the grid."""
DOUBLINGS = 2
"""How often the longest length may be doubled."""


class Candidate(NamedTuple):
    """A learning rate, and the length of its schedule."""

    place: int
    """In the grid, from 0; outside of it where the grid was widened."""
    doublings: int
    """How often the plan's longest length is doubled."""


@dataclass(frozen=True)
class SearchGrid:
    """The learning rates and lengths to search."""

    learning_rates: tuple[float, ...]
    """Learning rates, ascending."""
    chooses_length: bool
    """Whether a run may end at any step that was validated. False: at its last."""

    def learning_rate(self, place: int) -> float:
        """Return a learning rate; beyond an end the ratio of the last two goes on."""
        learning_rates = self.learning_rates
        if 0 <= place < len(learning_rates):
            return learning_rates[place]
        end, inner, n = (learning_rates[0], learning_rates[1], -place)
        if place > 0:
            end, inner, n = learning_rates[-1], learning_rates[-2], place - len(learning_rates) + 1
        return float(f"{end * (end / inner) ** n:.3g}")

    def wanted(self, tried: Mapping[Candidate, Curve | None]) -> list[Candidate]:
        """Return what is to be tried next; nothing where the search is over.

        Args:
            tried: Curves by candidate. None: it failed, as a run that diverges does.
        """
        if not tried:
            return [Candidate(place, 0) for place in range(len(self.learning_rates))]
        best = self.best(tried)
        if best is None:
            return []
        place, doublings = best
        near = [Candidate(p, doublings) for p in (place - 1, place + 1)]
        if self._ends_last(tried[best]) and doublings < DOUBLINGS:
            # A longer run may want a lower learning rate.
            near += [Candidate(p, doublings + 1) for p in (place, place - 1)]
        near = [candidate for candidate in near if self._within(candidate.place)]
        return [candidate for candidate in near if candidate not in tried]

    def best(self, tried: Mapping[Candidate, Curve | None]) -> Candidate | None:
        """Return the candidate of the lowest loss, of equal ones the cheapest; None: all failed."""
        losses = {c: self.end(curve)[1] for c, curve in tried.items() if curve}
        finite = [c for c, loss in losses.items() if math.isfinite(loss)]
        return min(finite, key=lambda c: (losses[c], c.doublings, c.place), default=None)

    def end(self, curve: Curve) -> tuple[int, float]:
        """Return the step at which a run of this curve ends, and its loss."""
        return min(curve, key=lambda point: point[1]) if self.chooses_length else curve[-1]

    def at_edge(self, candidate: Candidate) -> bool:
        """Say whether a candidate's learning rate is the last that may be tried."""
        n = len(self.learning_rates)
        return n > 1 and candidate.place in (-BEYOND, n - 1 + BEYOND)

    def _within(self, place: int) -> bool:
        beyond = BEYOND if len(self.learning_rates) > 1 else 0
        return -beyond <= place < len(self.learning_rates) + beyond

    def _ends_last(self, curve: Curve | None) -> bool:
        return self.chooses_length and curve is not None and self.end(curve)[0] == curve[-1][0]


@dataclass(frozen=True)
class Tuned:
    """The learning rate and length of a cell, and the curve that they were tuned by."""

    learning_rate: float
    doublings: int = 0
    step: int | None = None
    """Optimizer step to end at, of the trials' schedule. None: its last."""
    curve: Curve = ()
    """Of the trials at this learning rate and length, mean of the folds. Empty: none was run."""
    at_edge: bool = False
    """The learning rate is the last that may be tried: one beyond may be better."""
    at_end: bool = False
    """The step is the last that may be tried: more may be better."""

    @classmethod
    def of(cls, grid: SearchGrid, tried: Mapping[Candidate, Curve | None]) -> "Tuned | None":
        """Take the best of what was tried; None where all failed."""
        best = grid.best(tried)
        curve = None if best is None else tried[best]
        if best is None or curve is None:
            return None
        step = grid.end(curve)[0] if grid.chooses_length else None
        return cls(
            grid.learning_rate(best.place),
            best.doublings,
            step,
            curve,
            at_edge=grid.at_edge(best),
            at_end=step == curve[-1][0] and best.doublings == DOUBLINGS,
        )

    def stop_of(self, n_steps: int) -> int | None:
        """Return the step at which a schedule of `n_steps` ends; None: with its last.

        Schedules of trials and cells are equally long but where rows of both phases are mixed, as
        trials then hold some rows out; there the same share counts.
        """
        if self.step is None or self.step == self.curve[-1][0]:
            return None
        share = self.step / self.curve[-1][0]
        return max(1, round(share * n_steps)) if self.step else 0


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of the folds' curves at the steps that all were validated at."""
    losses = [dict(curve) for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, losses))) if losses else []
    return tuple((step, float(np.mean([own[step] for own in losses]))) for step in shared)
