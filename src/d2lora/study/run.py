"""Run the missing cells of a study: `d2lora study PLAN`.

study.json          the plan, the warm-ups, the learning rate and length chosen for each cell
results.jsonl       one line per finished cell
trials.jsonl        one line per trial of a learning rate
removed_rows.jsonl  training rows that overlap with an evaluation row, and why
done.json           the marker of completion: every cell is finished, and none has failed

While the study runs these files hold what is finished so far, so that `d2lora report` can look at
it. What is run lies in the store, so a killed study continues where it was, and a changed plan runs
only what is new.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2lora.data.sources import fault_lines
from d2lora.errors import RunError, counted, listed
from d2lora.runtime.claims import claimed
from d2lora.runtime.console import Bar, Reporter, table_console
from d2lora.runtime.grids import as_table
from d2lora.runtime.run_folder import DONE, provenance, write_json, write_text
from d2lora.settings import StudySettings
from d2lora.study.cells import BASE, Cell, cells_of
from d2lora.study.decontamination import Check, contamination_lines, decontaminated
from d2lora.study.executors import executor, layout
from d2lora.study.forecast import forecast
from d2lora.study.jobs import Scored, Trial
from d2lora.study.needs import Needs
from d2lora.study.plan import StudyPlan
from d2lora.study.queue import Queue
from d2lora.study.readiness import check, check_folder, place, warnings_of
from d2lora.study.steps import CellFailedError, Missing, Steps, T, reached
from d2lora.study.store import Job

_LEAST_BETWEEN_S = 30.0
"""Between two times at which a running study writes what is finished."""
_SHARE = 20
"""So many times as long as the writing takes lies between, too."""


@dataclass(frozen=True)
class Study:
    """A study's folder, and what became of its cells."""

    path: Path
    plan: StudyPlan
    results: list[dict[str, Any]]
    failures: dict[str, str]
    """Cell -> reason."""

    def check(self) -> None:
        """Check that every cell is finished.

        Raises:
            RunError: With the cells that failed, and why.
        """
        if self.failures:
            reasons = listed([f"{cell}: {reason}" for cell, reason in self.failures.items()])
            n_cells = len(self.results) + len(self.failures)
            raise RunError(
                f"{self.path}: {len(self.failures)} of {n_cells} cells failed; what is finished is "
                f"kept, and the next run retries the others:\n{reasons}"
            )


def run_study(settings: StudySettings) -> Study:
    """Run the missing cells of a study and write what was found.

    Raises:
        D2LoraError: One of its kinds, for a plan, data or a base that cannot be used. A cell that
            fails while it runs is reported in the result instead.
    """
    reporter = Reporter(quiet=settings.quiet)
    plan, store, out = place(settings)
    with claimed(out, "folder"):
        check_folder(out)
        return _run_study(settings, plan, store, out, reporter)


def _run_study(
    settings: StudySettings, plan: StudyPlan, store: Path, out: Path, reporter: Reporter
) -> Study:
    check(plan, reporter.say)
    (out / DONE).unlink(missing_ok=True)  # of an earlier run
    for message in warnings_of(plan):
        reporter.say(f"warning: {message}")
    # Workers load their libraries while the rows are checked.
    with executor(settings.executor, settings.workers, settings.address) as queue:
        plan, checks = decontaminated(plan, store, store / "world", reporter.say)
        for line in contamination_lines(c.to_json() for c in checks if c.removed):
            reporter.say(f"contamination: {line}")
        needs, cells = Needs(plan, store, keep_adapters=settings.keep_adapters), cells_of(plan)
        with reporter.bar("cells", len(cells)) as bar:
            run = _Run(needs, queue, bar, reporter)
            for _ in run.all(cells):
                _write(out, needs, cells, run, checks)
    results = _write(out, needs, cells, run, checks)
    failures = {str(cell): reason for cell, reason in run.failures.items()}
    if not failures:
        write_json(out / DONE, {"kind": "study", "n_cells": len(cells)})
    return Study(out, plan, results, failures)


class _Run:
    """The loop: ask each cell what it needs, queue that, wait, ask again."""

    def __init__(self, needs: Needs, queue: Queue, bar: Bar, reporter: Reporter) -> None:
        self.finished: dict[Cell, dict[str, Any]] = {}
        self.failures: dict[Cell, str] = {}
        self._needs, self._queue, self._bar, self._reporter = needs, queue, bar, reporter
        self._blocked: dict[Cell, set[str]] = {}

    def all(self, cells: Sequence[Cell]) -> Iterator[None]:
        """Run all cells; yield now and then, where more of them are finished than before."""
        # By seed, so that what is finished first can be compared.
        self._ask(sorted(cells, key=lambda cell: cell.seed))
        n_seen, due_s = len(self.finished), 0.0
        for job, outcome in self._queue.ended():
            self._take(job, outcome)
            if len(self.finished) > n_seen and time.monotonic() > due_s:
                n_seen, began_s = len(self.finished), time.monotonic()
                yield
                took_s = time.monotonic() - began_s
                due_s = time.monotonic() + max(_LEAST_BETWEEN_S, _SHARE * took_s)

    def _ask(self, cells: Iterable[Cell], *, ahead: bool = False) -> None:
        new: list[Job] = []
        for cell in cells:
            try:
                step = reached(self._needs.result(cell))
            except CellFailedError as reason:
                self.failures[cell] = str(reason).removeprefix(f"{cell}: ")
                self._reporter.say(f"failed: {cell}: {self.failures[cell]}")
                continue
            if not isinstance(step, Missing):
                self.finished[cell] = step
                continue
            self._blocked[cell] = {job.key for job in step.jobs}
            new += step.jobs
        # What others wait for first, then the longest, so that no core is idle at the end.
        new.sort(key=lambda job: (isinstance(job, Scored | Trial), -job.about[1]))
        self._queue.add(new, ahead=ahead)
        failed = f", {len(self.failures)} failed" if self.failures else ""
        done = len(self.finished) + len(self.failures)
        self._bar.update(done, f"{counted(len(self._queue), 'job')} running or queued{failed}")

    def _take(self, job: Job, outcome: dict[str, Any] | str) -> None:
        self._needs.note(job, outcome)
        free: list[Cell] = []
        for cell, keys in self._blocked.items():
            keys.discard(job.key)
            if not keys:
                free.append(cell)
        for cell in free:
            del self._blocked[cell]
        # A cell that was begun is finished before others are begun.
        self._ask(free, ahead=True)


def _row(needs: Needs, cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    kind = next((arm.kind for arm in needs.plan.arms if arm.name == cell.arm), BASE)
    key = needs.last[cell].key
    return {"arm": cell.arm, "kind": kind, "key": key, **asdict(cell), **_measured(result)}


def _measured(result: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k not in ("label", "about", "provenance")}


def _write(
    out: Path, needs: Needs, cells: Sequence[Cell], run: _Run, checks: Sequence[Check]
) -> list[dict[str, Any]]:
    """Write what the report reads, of the cells that are finished; return their rows."""
    results = [_row(needs, cell, run.finished[cell]) for cell in cells if cell in run.finished]
    lines = "".join(json.dumps(row) + "\n" for row in results)
    write_text(out / "results.jsonl", lines)
    trials, choices = _chosen(needs, cells)
    write_text(out / "trials.jsonl", "".join(json.dumps(row) + "\n" for row in trials))
    _write_removed(out / "removed_rows.jsonl", checks)
    study = {
        "plan": needs.plan.model_dump(mode="json"),
        "contamination": [check.to_json() for check in checks],
        "n_cells": len(cells),
        "failures": {str(cell): reason for cell, reason in run.failures.items()},
        "chosen": choices,
        "warm_ups": _warm_ups(needs),
        "store": str(needs.store),
        "provenance": provenance(),
    }
    write_json(out / "study.json", study)
    return results


def _write_removed(path: Path, checks: Sequence[Check]) -> None:
    """Write the rows that were removed, each once; no file where there are none."""
    faults = dict.fromkeys(one.leak.as_fault(one.row) for check in checks for one in check.removed)
    if faults:
        write_text(path, fault_lines(faults))
    else:
        path.unlink(missing_ok=True)


def _chosen(
    needs: Needs, cells: Sequence[Cell]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the trials, and what was tuned by them for each cell."""
    trials: list[dict[str, Any]] = []
    choices: list[dict[str, Any]] = []
    for cell in cells:
        if not needs.tunes(cell):
            continue
        tried = _where_possible(needs.trials(cell))
        if tried is None:
            continue
        for job, fold in ((job, fold) for jobs in tried.values() for fold, job in enumerate(jobs)):
            result = needs.done.get(job.key, {"failed": needs.failed.get(job.key)})
            trial = {"learning_rate": job.training.learning_rate, "fold": fold, "key": job.key}
            trials.append({**asdict(cell), **trial, **_measured(result)})
        tuned = _where_possible(needs.tuned(cell))
        if tuned is not None:
            choices.append({**asdict(cell), **asdict(tuned)})
    return trials, choices


def _where_possible(steps: Steps[T]) -> T | None:
    """Return what steps lead to; None where a job on their way is missing or has failed."""
    try:
        step = reached(steps)
    except CellFailedError:
        return None
    return None if isinstance(step, Missing) else step


def _warm_ups(needs: Needs) -> dict[str, Any]:
    """Return the finished warm-ups by name, those of further seeds beside the first."""
    found: dict[str, Any] = {}
    for name in needs.plan.warm_ups:
        for seed in range(needs.plan.warm_up_seeds_of(name)):
            job = _where_possible(needs.warm_up(name, seed))
            if job is not None and job.key in needs.done:
                warm_up = {"path": str(job.path), "key": job.key, **needs.done[job.key]}
                found[f"{name}, seed {seed}" if seed else name] = warm_up
    return found


def dry_run(settings: StudySettings) -> None:
    """Print what a study would run, and for how long; run nothing.

    Raises:
        D2LoraError: One of its kinds, for a plan, data or a base that cannot be used.
    """
    plan, store, _ = place(settings)
    check(plan, fetch=False)
    plan, checks = decontaminated(plan, store, store / "world", fetch=False)
    grids, note = forecast(
        plan, store, cells_of(plan), *layout(settings.executor, settings.workers)
    )
    for grid in grids:
        table_console().print(as_table(grid))
    table_console().print(note, highlight=False, markup=False)
    for line in contamination_lines(c.to_json() for c in checks):
        table_console().print(f"contamination: {line}", highlight=False, markup=False)
