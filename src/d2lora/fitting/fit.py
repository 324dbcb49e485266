"""From a task's rows to the best adapter: `d2lora fit`.

adapter/       the adapter, in PEFT's format
index.html     what was tried and found
fit.json       the same as numbers
commands.sh    the commands that make the same adapter
store/         the runs; the same command continues a killed fit
done.json      the marker of completion
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2lora.adapters.base_files import base_folder
from d2lora.data.reading import TaskData, read_task
from d2lora.data.sources import BAD_ROWS, nested_order, write_bad_rows
from d2lora.errors import DataError, RunError, SettingsError, counted
from d2lora.fitting.found import Fitted
from d2lora.fitting.page import page, show, to_json
from d2lora.fitting.plan import TASK, plan_of
from d2lora.fitting.repeat import commands_of
from d2lora.fitting.search import Search
from d2lora.fitting.starts import at_rank, rank_of, warm_starts_of
from d2lora.runtime.claims import check_writable, claimed
from d2lora.runtime.console import Reporter, table_console
from d2lora.runtime.run_folder import (
    DONE,
    SETTINGS,
    new_folder,
    present,
    provenance,
    write_json,
    write_shared,
    write_text,
)
from d2lora.settings import FitSettings
from d2lora.settings.seeds import stream_seed
from d2lora.study.decontamination import FOLDER, contamination_lines, decontaminated
from d2lora.study.executors import executor, layout
from d2lora.study.needs import Needs
from d2lora.study.plan import StudyPlan
from d2lora.study.queue import Queue
from d2lora.study.readiness import check, warnings_of
from d2lora.study.steps import Missing, Steps, T, reached
from d2lora.study.store import Job

PAGE = "index.html"
FIT = "fit.json"
_BEFORE_FIT = {"store", SETTINGS, BAD_ROWS, "adapter", "commands.sh"}
"""What a fit that died may have written."""


@dataclass(frozen=True)
class Fit:
    """A finished fit."""

    path: Path
    found: Fitted

    @property
    def adapter(self) -> Path:
        """The adapter."""
        return self.path / "adapter"


def fit(settings: FitSettings) -> Fit:
    """Find the best adapter for a task by cross-validation within its rows.

    Args:
        settings: The fit's settings.

    Raises:
        D2LoraError: One of its kinds, for settings, data, a base or a warm start that cannot be
            used.
    """
    reporter = Reporter(quiet=settings.quiet)
    with claimed(settings.out, "folder"):
        _check_folder(settings.out)
        return _fit(settings, reporter)


def _fit(settings: FitSettings, reporter: Reporter) -> Fit:
    out, store = settings.out, (settings.out / "store").resolve()
    data = _rows(settings, reporter)
    base_folder(settings.base, settings.revision, settings.gguf_file)
    starts = warm_starts_of(settings)
    if not starts and settings.warm_starts is None:
        reporter.say(f"no warm start was found beside {settings.base}: name some as --warm-starts")
    if not starts and not settings.inits:
        raise SettingsError("nothing to try: give --warm-starts or --inits")
    check_writable(store, "--out")
    (out / DONE).unlink(missing_ok=True)  # of an earlier fit
    write_text(out / SETTINGS, settings.to_yaml())
    if data.faults:
        write_bad_rows(data.faults, out)
        settings = settings.changed(data=(_good_rows(data, store),), skip_bad_rows=False)
    rank = rank_of(settings, starts)
    starts = [at_rank(start, rank, store / "warm-starts") for start in starts]
    n = settings.n or len(data.examples)
    _check_number(n)
    plan = plan_of(settings, starts, rank, n)
    lines: list[str] = []
    with executor(settings.executor, settings.workers, settings.address) as queue:
        with _as_of_a_fit():
            _check(plan, settings, reporter)
            # Without --n what is left is used.
            least = plan.changed(sizes=(settings.n or 1,))
            plan, checks = decontaminated(least, store, store / "world")
        found_in = contamination_lines(one.to_json() for one in checks if one.removed)
        lines = [line.removeprefix(f"task {TASK}: ") for line in found_in]
        for line in lines:
            reporter.say(f"contamination: {line}")
        if settings.n is None:
            n -= sum(len(one.removed) for one in checks)
            plan = plan.changed(sizes=(n,))
        _check_number(n)
        n_workers, _ = layout(settings.executor, settings.workers)
        needs = Needs(plan, store, keep_adapters=True)
        reporter.say(
            f"{counted(n, 'row')}, {counted(len(plan.arms), 'initialization')}, rank {rank}: "
            f"cross-validation in {min(settings.folds, n)} folds, "
            f"{counted(n_workers, 'run')} at a time"
        )
        rows = read_task(plan.tasks[TASK].data, settings.task, skip_bad=settings.skip_bad_rows)
        chosen = nested_order(len(rows.examples), stream_seed(settings.seed, "subset"))[:n]
        _say_twice([rows.examples[index].question for index in chosen], reporter)
        search = Search(settings, needs, n, n_workers)
        found = _reached(search.fitted, needs, queue, reporter)
    _write(settings, plan, found, lines)
    return Fit(out, found)


def _check_number(n: int) -> None:
    if n < 2:
        raise DataError(f"{counted(n, 'row')}: at least 2 are needed, one to hold out")


def _rows(settings: FitSettings, reporter: Reporter) -> TaskData:
    """Read the task's rows, and check that a fit can learn from them."""
    if settings.overlong == "drop":
        raise SettingsError(
            "--overlong drop: every row of a fit is held out once, so none is dropped in training; "
            "use truncate, or leave out long rows"
        )
    data = read_task(
        settings.data, settings.task, skip_bad=settings.skip_bad_rows, say=reporter.say
    )
    if data.task.answers == "pairs":
        raise DataError(
            "a fit learns completions, and these rows hold preferences; compare initializations "
            "for dpo or orpo with d2lora study"
        )
    if data.faults:
        skipped = counted(len(data.faults), "bad row")
        reporter.say(f"skipped {skipped}: {settings.out / BAD_ROWS}")
    n = settings.n or len(data.examples)
    if n > len(data.examples):
        raise DataError(f"{n} rows are requested, but the data has {len(data.examples)}")
    if n < 2:
        raise DataError(f"{counted(n, 'row')}: at least 2 are needed, one to hold out")
    return data


def _good_rows(data: TaskData, store: Path) -> str:
    """Write the rows that are not bad, which the runs read; return the file."""
    lines = [json.dumps(row.values, ensure_ascii=False, default=str) for row in data.rows]
    text = "".join(f"{line}\n" for line in lines)
    path = store / FOLDER / f"good-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    write_shared(path, text)
    return str(path)


def _say_twice(questions: Sequence[str], reporter: Reporter) -> None:
    """Warn of rows of which one may be trained on while its like is held out."""
    twice = len(questions) - len(set(questions))
    if twice:
        reporter.say(
            f"warning: {counted(twice, 'row')} of {len(questions):,} ask what another asks; where "
            "one is trained on and the other held out, scores by cross-validation are too high"
        )


@contextmanager
def _as_of_a_fit() -> Generator[None]:
    """Say of a fit what is said of a study's only task."""
    try:
        yield
    except DataError as error:
        text = str(error).replace(f"tasks.{TASK}: ", "").replace(f"task {TASK}: ", "")
        raise DataError(text.replace("the study", "the fit")) from None


def _check(plan: StudyPlan, settings: FitSettings, reporter: Reporter) -> None:
    """Open all that the fit needs, and say what its limits cut."""
    check(plan)
    task = plan.tasks[TASK]
    # Every row is answered; without test rows their limits are those that count.
    own = plan.changed(tasks={TASK: task.changed(test=task.test or task.data)})
    for message in warnings_of(own):
        reporter.say(f"warning: {message.removeprefix(f'tasks.{TASK}: ')}")
    if not settings.test:
        reporter.say("no --test: scores are those of cross-validation")


def _reached(make: Callable[[], Steps[T]], needs: Needs, queue: Queue, reporter: Reporter) -> T:
    """Run what steps are missing until they reach their end."""
    n_done = 0
    with reporter.bar("runs", 1) as bar:
        while isinstance(step := reached(make()), Missing):
            queue.add(step.jobs)
            for job, outcome in queue.ended():
                needs.note(job, outcome)
            n_done += len(step.jobs)
            bar.update(0, f"{counted(n_done, 'run')} done")
            reporter.say(_progress(step.jobs, n_done))
    return step


def _progress(jobs: Sequence[Job], n_done: int) -> str:
    kinds = {
        "Trial": "trials", "HeldOut": "answers to rows held out", "Prompted": "answers of the base",
        "Averaged": "averages", "Interpolated": "points on the way", "Trained": "final runs",
        "AveragedWhole": "the final average", "InterpolatedWhole": "the final point on the way",
        "Scored": "test rows", "Ready": "warm starts",
    }  # fmt: skip
    what = ", ".join(dict.fromkeys(kinds[type(job).__name__] for job in jobs))
    return f"{what}: {counted(len(jobs), 'run')} ({n_done} in all)"


def _write(
    settings: FitSettings, plan: StudyPlan, found: Fitted, contamination: Sequence[str]
) -> None:
    out = settings.out
    with new_folder(out / "adapter") as folder:
        shutil.copytree(found.adapter.path, folder, dirs_exist_ok=True)
    about: dict[str, Any] = {
        "rows": len(found.data.examples),
        "contamination": list(contamination),
        "provenance": provenance(),
    }
    commands = commands_of(found, out)
    write_text(out / "commands.sh", commands)
    write_json(out / FIT, {**to_json(found), **about})
    write_text(out / PAGE, page(settings, plan, found, commands, about))
    write_json(out / DONE, {"kind": "fit"})


def _check_folder(out: Path) -> None:
    """Check that a folder is empty, not there yet, or a fit's.

    Raises:
        RunError: If it is not.
    """
    names = set(present(out))
    begun = "store" in names and names <= _BEFORE_FIT  # it is made before all else
    if names and not begun and not (out / FIT).is_file():
        raise RunError(f"{out} holds something that is not a fit; choose another --out")


def command(settings: FitSettings) -> None:
    """Run `d2lora fit`."""
    done = fit(settings)
    show(done.found, table_console())
    reporter = Reporter(quiet=settings.quiet)
    reporter.say(f"adapter: {done.adapter}")
    reporter.say(f"page: {done.path / PAGE}")
