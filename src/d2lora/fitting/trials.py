"""The trials of one initialization: learning rates and lengths, on more and more folds."""

import math
from collections.abc import Sequence

from d2lora.errors import DataError
from d2lora.fitting.found import Contender, Tried
from d2lora.study.cells import Cell
from d2lora.study.jobs import Trial
from d2lora.study.needs import Needs
from d2lora.study.steps import Steps
from d2lora.study.tuning import Candidate, Curve, SearchGrid, Tuned, mean_curve


class Trials:
    """The trials of one initialization: what was tried, on how many folds."""

    def __init__(self, needs: Needs, cell: Cell, grid: SearchGrid | None = None) -> None:
        """Search a grid; that of the plan, where none is given."""
        self._needs, self._cell = needs, cell
        self._grid = grid or needs.grid(cell)
        self._curves: dict[Candidate, Curve | None] = {}
        self._n_folds: dict[Candidate, int] = {}
        self._asked: dict[Candidate, list[Trial]] = {}

    def wanted(self) -> Steps[list[Trial]]:
        """Lead to the trials, on the first fold, that the search asks for next."""
        new = self._grid.wanted(self._curves)
        return (yield from self._ask(new, 1))

    def halved(self, n_folds: int) -> Steps[list[Trial]]:
        """Lead to the trials of the better half of what was tried last, on more folds."""
        most = max(self._n_folds.values(), default=1)
        alive = [c for c, n in self._n_folds.items() if n == most and self._curves[c]]
        alive.sort(key=lambda c: (self._loss(c), c))
        return (yield from self._ask(alive[: math.ceil(len(alive) / 2)], n_folds))

    def _ask(self, candidates: Sequence[Candidate], n_folds: int) -> Steps[list[Trial]]:
        self._asked = {}
        for candidate in candidates:
            jobs = yield from self._needs.trial_jobs(self._cell, self._grid, candidate)
            self._asked[candidate] = jobs[:n_folds]
        return [job for jobs in self._asked.values() for job in jobs]

    def take(self) -> None:
        """Read the curves of what was asked for."""
        for candidate, jobs in self._asked.items():
            results = [self._needs.done.get(job.key) for job in jobs]
            curves = [result["curve"] for result in results if result is not None]
            whole = len(curves) == len(jobs)
            self._curves[candidate] = mean_curve(curves) if whole else None
            self._n_folds[candidate] = len(jobs)

    def chosen(self, name: str) -> Contender:
        """Return the best of what was tried on the most folds.

        Raises:
            DataError: If every trial failed.
        """
        most = max((n for c, n in self._n_folds.items() if self._curves[c]), default=0)
        last = {c: curve for c, curve in self._curves.items() if self._n_folds[c] == most}
        tuned = Tuned.of(self._grid, last)
        if tuned is None:
            reason = next(iter(self._needs.failed.values()), "no row can be held out")
            raise DataError(f"{name}: no learning rate could be used: {reason}")
        tried = [
            Tried(
                self._grid.learning_rate(c.place),
                curve[-1][0],
                self._n_folds[c],
                *self._grid.end(curve),
            )
            for c, curve in self._curves.items()
            if curve
        ]
        return Contender(name, tuned, tried)

    def _loss(self, candidate: Candidate) -> float:
        curve = self._curves[candidate]
        return self._grid.end(curve)[1] if curve else math.inf
