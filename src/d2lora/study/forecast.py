"""What a study would run, and for how long: `d2lora study PLAN --dry-run`."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from d2lora.data.sources import is_local
from d2lora.errors import counted
from d2lora.runtime.grids import Grid
from d2lora.runtime.run_folder import read_json
from d2lora.study.calibration import N_STEPS, Calibration, n_rows_of, n_steps_of
from d2lora.study.cells import Cell
from d2lora.study.jobs import Mixed, Scored, Trial, WarmUp
from d2lora.study.needs import Needs
from d2lora.study.plan import StudyPlan
from d2lora.study.steps import Missing, reached
from d2lora.study.store import RESULT, Job

_WORDS = {
    "WarmUp": "warm-ups", "Merged": "merged bases", "Norms": "random adapters",
    "Mixed": "mixed files", "Paired": "preference pairs",
    "Trial": "trials", "Scored": "cells", "Ready": "existing warm starts",
}  # fmt: skip


class _Assumed(Needs):
    """Assumes that every missing job is done, and keeps a list of them."""

    def __init__(self, plan: StudyPlan, store: Path) -> None:
        super().__init__(plan, store, keep_adapters=True)
        self.missing: dict[str, Job] = {}
        self.present: dict[str, Job] = {}

    def look_for(self, jobs: Sequence[Job]) -> list[Job]:
        for job in jobs:
            result = job.result()
            (self.missing if result is None else self.present)[job.key] = job
            self.done[job.key] = self._assumed(job) if result is None else result
        return []

    def _assumed(self, job: Job) -> dict[str, Any]:
        """Return a result by which nothing has to be widened: the best lies in the middle."""
        if isinstance(job, WarmUp):
            known = (
                job.settings.m or job.settings.max_steps or all(map(is_local, job.settings.data))
            )
            return {"cost": {"n_steps": n_steps_of(job.settings) if known else 0}}
        if isinstance(job, Mixed):
            return {"n_rows": n_rows_of(job)}
        if isinstance(job, Trial):
            rates = self.plan.learning_rates
            middle = sum(map(math.log, rates)) / len(rates)
            loss = abs(math.log(job.training.learning_rate) - middle)
            end = job.training.max_steps or 1
            steps = sorted({0, math.ceil(0.75 * end), end})
            return {"curve": [[step, loss + abs(step - 0.75 * end) / end] for step in steps]}
        return {}


def forecast(
    plan: StudyPlan, store: Path, cells: Sequence[Cell], n_workers: int, n_threads: int | None
) -> tuple[list[Grid], str]:
    """Return two tables and a note on their times.

    What a search for a learning rate and a length tries beyond the plan's own is not known before;
    a run is taken to end after three quarters of its longest length.

    The tables are the cells of each arm, and the runs there and missing with their time. Times are
    those of runs of the same kind in the store, of the same task and size or the nearest size;
    where there is none they are estimated from a few steps measured here. Runs at a time and the
    threads of each are as `executors.layout` gives them.
    """
    needs = _Assumed(plan, store)
    done: dict[Cell, bool] = {}
    for cell in cells:
        last = reached(needs.last_job(cell))
        assert not isinstance(last, Missing), "every missing job is assumed to be done"
        needs.look_for([last])
        done[cell] = last.key in needs.present
    calibration = Calibration(plan, n_threads)
    runs, note = _runs(needs, _Seconds(_times(store), calibration), n_workers)
    return [_cells(cells, done), runs], note


def _cells(cells: Sequence[Cell], done: dict[Cell, bool]) -> Grid:
    groups = Counter((cell.task, cell.n, cell.arm) for cell in cells)
    there = Counter((cell.task, cell.n, cell.arm) for cell in cells if done[cell])
    rows = [
        (task, str(n) if n else "-", arm, str(count), str(there[task, n, arm]))
        for (task, n, arm), count in sorted(groups.items())
    ]
    return Grid(counted(len(cells), "cell"), ("task", "n", "arm", "cells", "done"), rows)


def _times(store: Path) -> dict[tuple[str, str, int], list[float]]:
    """Return the seconds of finished runs: (kind, task, n) -> each."""
    times: dict[tuple[str, str, int], list[float]] = {}
    for path in store.glob(f"*/{RESULT}"):
        result = read_json(path)
        kind, task, n = result["about"]
        kind = _kind(kind, result.get("average_of", 1))
        times.setdefault((kind, task, n), []).append(result["job_s"])
    return times


def _kind(name: str, n_runs: int) -> str:
    """Return the kind of runs of like length: averages are several runs in one."""
    return f"{name}, average of {n_runs}" if n_runs > 1 else name


class _Seconds:
    """Estimates the seconds of runs, and whether they were calibrated here."""

    def __init__(
        self, times: dict[tuple[str, str, int], list[float]], calibration: Calibration
    ) -> None:
        self._times, self._calibration = times, calibration

    def of(self, jobs: Sequence[Job]) -> tuple[float | None, bool]:
        """Return the seconds of all jobs (None: unknown), and whether they were calibrated here."""
        total, calibrated = 0.0, False
        for job in jobs:
            seconds = self._like(job)
            if seconds is None:
                seconds, calibrated = self._calibration.seconds(job), True
            if seconds is None:
                return None, False
            total += seconds
        return total, calibrated

    def note(self, *, calibrated: bool, unknown: bool) -> str:
        """Return a note on how the times were estimated."""
        if unknown:
            why = self._calibration.why_not
            return f"No time can be estimated until runs of each kind are done: {why}"
        if calibrated:
            return (
                f"about: a rough estimate from {N_STEPS} steps and one batch of answers, measured "
                "here; once runs of each kind are done, their times are used"
            )
        return "Times are those of finished runs of the same kind"

    def _like(self, job: Job) -> float | None:
        """Return the mean seconds of runs of its kind and task at the nearest size, by ratio."""
        kind = _kind(type(job).__name__, getattr(job, "average_of", 1))
        task, n = job.about
        like = {s: seconds for (k, t, s), seconds in self._times.items() if (k, t) == (kind, task)}
        if not like:
            return None
        nearest = min(like, key=lambda s: max(s, 1) / max(n, 1) if s > n else n / max(s, 1))
        ratio = max(n, 1) / max(nearest, 1) if isinstance(job, Trial | Scored) else 1.0
        return mean(like[nearest]) * max(ratio, 1.0)


def _runs(needs: _Assumed, seconds: _Seconds, n_workers: int) -> tuple[Grid, str]:
    rows: list[tuple[str, ...]] = []
    kinds: list[tuple[float | None, bool]] = []
    for kind, word in _WORDS.items():
        missing = [job for job in needs.missing.values() if type(job).__name__ == kind]
        present = sum(type(job).__name__ == kind for job in needs.present.values())
        if missing or present:
            total, calibrated = seconds.of(missing)
            kinds.append((total, calibrated))
            minutes = _minutes(total, n_workers, calibrated=calibrated)
            rows.append((word, str(present), str(len(missing)), minutes))
    unknown = any(total is None for total, _ in kinds)
    calibrated = any(calibration for _, calibration in kinds)
    total = None if unknown else sum(total or 0.0 for total, _ in kinds)
    minutes = _minutes(total, n_workers, calibrated=calibrated)
    rows.append(("all", str(len(needs.present)), str(len(needs.missing)), minutes))
    grid = Grid(
        f"Runs; minutes with {n_workers} at a time",
        ("what", "in the store", "to be run", "minutes"), rows,
    )  # fmt: skip
    note = seconds.note(calibrated=calibrated, unknown=unknown)
    if any(isinstance(job, Trial) for job in needs.missing.values()):
        note += (
            ". Not counted: trials beyond the plan's learning rates and steps, where the best lies "
            "at their edge"
        )
    return grid, note


def _minutes(seconds: float | None, n_workers: int, *, calibrated: bool) -> str:
    if seconds is None:
        return "unknown"
    return f"{'about ' if calibrated else ''}{seconds / n_workers / 60:.1f}"
