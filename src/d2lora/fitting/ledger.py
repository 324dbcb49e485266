"""The budget of a fit: what was spent, what more would cost, what was left out for want of time.

Times are those of the runs in the store, so that a fit that was killed decides as it did before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from d2lora.fitting.jobs import Tuning
from d2lora.settings import AdaptSettings
from d2lora.study.jobs import Trial
from d2lora.study.store import Job

J = TypeVar("J", bound=Job)
_UNSEEN = 1.5
"""What a run that also answers rows takes, in times of its training, before one was timed."""


def n_steps_of(settings: AdaptSettings) -> int:
    """Return the optimizer steps of a run whose length is set in steps."""
    return min(settings.max_steps or 0, settings.stop_step or settings.max_steps or 0)


@dataclass
class Ledger:
    """Time spent, in the order in which runs were asked for."""

    budget_s: float | None
    n_workers: int
    """Runs at a time."""
    spent_s: float = 0.0
    left_out: list[str] = field(default_factory=list[str])
    """What there was no time for, in words."""
    _noted: set[str] = field(default_factory=set[str])
    _trained_s: float = 0.0
    _n_steps: int = 0
    _answered: list[float] = field(default_factory=list[float])

    def note(self, jobs: Sequence[Job], done: Mapping[str, Mapping[str, Any]]) -> None:
        """Count the time of finished runs, each once; what failed counts as none."""
        for job in self.new(jobs):
            self._noted.add(job.key)
            seconds = float(done.get(job.key, {}).get("job_s", 0))
            self.spent_s += seconds / self.n_workers
            if isinstance(job, Trial) and job.key in done:
                self._trained_s += seconds
                self._n_steps += n_steps_of(job.training)
            if isinstance(job, Tuning) and job.key in done:
                own = self.training_s(job.training) if "cost" in done[job.key] else 0.0
                self._answered.append(max(0.0, seconds - own))

    def new(self, jobs: Sequence[J]) -> list[J]:
        """Return the jobs that were not counted yet, once each."""
        return list({job.key: job for job in jobs if job.key not in self._noted}.values())

    def training_s(self, *runs: AdaptSettings) -> float:
        """Return what training takes, in seconds of one worker."""
        per_step = self._trained_s / self._n_steps if self._n_steps else 0.0
        return per_step * sum(map(n_steps_of, runs))

    def answering_s(self, jobs: Sequence[Tuning], *, trains: bool = True) -> float:
        """Return what runs take that answer rows left out, in seconds of a worker."""
        runs = [job.training for job in self.new(jobs)]
        training = self.training_s(*runs)
        if not self._answered:
            return _UNSEEN * training
        answering = len(runs) * sum(self._answered) / len(self._answered)
        return answering + training if trains else answering

    def affords(self, what: str, seconds: float, reserve_s: float = 0.0) -> bool:
        """Say whether there is time for something; what there is none for is remembered.

        Args:
            what: It, in words.
            seconds: What it takes, in seconds of one worker.
            reserve_s: What is still to come in any case.
        """
        if self.budget_s is None:
            return True
        if self.spent_s + (seconds + reserve_s) / self.n_workers <= self.budget_s:
            return True
        self.left_out.append(what)
        return False
