"""What a study would run, and for how long: `d2lora study PLAN --dry-run`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from d2lora.executors import n_cores
from d2lora.grids import Grid
from d2lora.jobs import RESULT, Job, Scored, Trial
from d2lora.needs import Cell, Needs
from d2lora.plan import StudyPlan
from d2lora.runs import read_json

_WORDS = {
    "WarmUp": "warm-ups", "Merged": "merged bases", "Norms": "random adapters",
    "Mixed": "mixed files", "Paired": "preference pairs",
    "Trial": "trials of rates", "Scored": "cells",
}  # fmt: skip


class _Assumed(Needs):
    """Goes on as if every missing job were done, and keeps a list of them."""

    def __init__(self, plan: StudyPlan, store: Path) -> None:
        super().__init__(plan, store, keep_adapters=True)
        self.missing: dict[str, Job] = {}
        self.present: dict[str, Job] = {}

    def need_all(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            result = job.result()
            (self.missing if result is None else self.present)[job.key] = job
            done = {"cost": {"n_steps": 0}, "validation_loss_after": 0.0}
            self.done[job.key] = done if result is None else result


def forecast(plan: StudyPlan, store: Path, cells: Sequence[Cell], n_workers: int) -> list[Grid]:
    """Return two tables: the cells of each arm, and the runs there and missing with their time.

    Times are those of runs of the same kind in the store, of the same task and size or the nearest
    size; where there is none, nothing is foretold.
    """
    needs = _Assumed(plan, store)
    last = {cell: needs.last_job(cell) for cell in cells}
    done = {cell: job.result() is not None for cell, job in last.items()}
    for job in last.values():
        needs.need_all([job])
    return [_cells(cells, done), _runs(needs, _times(store), n_workers or n_cores())]


def _cells(cells: Sequence[Cell], done: dict[Cell, bool]) -> Grid:
    groups = Counter((cell.task, cell.n, cell.arm) for cell in cells)
    there = Counter((cell.task, cell.n, cell.arm) for cell in cells if done[cell])
    rows = [
        (task, str(n) if n else "-", arm, str(count), str(there[task, n, arm]))
        for (task, n, arm), count in sorted(groups.items())
    ]
    return Grid(f"{len(cells)} cells", ("task", "n", "arm", "cells", "done"), rows)


def _times(store: Path) -> dict[tuple[str, str, int], list[float]]:
    """Return the seconds of finished runs: (kind, task, n) -> each."""
    times: dict[tuple[str, str, int], list[float]] = {}
    for path in store.glob(f"*/{RESULT}"):
        result = read_json(path)
        kind, task, n = result["about"]
        times.setdefault((kind, task, n), []).append(result["job_s"])
    return times


def _runs(needs: _Assumed, times: dict[tuple[str, str, int], list[float]], n_workers: int) -> Grid:
    rows: list[tuple[str, ...]] = []
    total, known = 0.0, True
    for kind, word in _WORDS.items():
        missing = [job for job in needs.missing.values() if type(job).__name__ == kind]
        present = sum(type(job).__name__ == kind for job in needs.present.values())
        if not missing and not present:
            continue
        seconds = [_foretold(job, times) for job in missing]
        sure = [s for s in seconds if s is not None]
        known = known and len(sure) == len(seconds)
        total += sum(sure)
        told = f"{sum(sure) / n_workers / 60:.1f}" if len(sure) == len(seconds) else "unknown"
        rows.append((word, str(present), str(len(missing)), told))
    minutes = f"{total / n_workers / 60:.1f}" if known else "unknown until some have run"
    rows.append(("all", str(len(needs.present)), str(len(needs.missing)), minutes))
    return Grid(
        f"Runs; minutes with {n_workers} at a time",
        ("what", "in the store", "to be run", "minutes"), rows,
    )  # fmt: skip


def _foretold(job: Job, times: dict[tuple[str, str, int], list[float]]) -> float | None:
    """Return a run's seconds, from those of its kind and task at the nearest size, by ratio."""
    kind = type(job).__name__
    task, n = job.about
    like: dict[int, list[float]] = {
        size: seconds for (k, t, size), seconds in times.items() if (k, t) == (kind, task)
    }
    if not like:
        return None
    nearest = min(like, key=lambda size: max(size, 1) / max(n, 1) if size > n else n / max(size, 1))
    ratio = max(n, 1) / max(nearest, 1) if isinstance(job, Trial | Scored) else 1.0
    return mean(like[nearest]) * max(ratio, 1.0)
