"""How long runs would take, estimated from a few steps and test rows measured here.

For a study of which nothing has run yet. What is measured is the study's own code: a few optimizer
steps of each warm-up and task, one batch of answers of the base, a few rows of what forgetting is
measured on.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from d2lora.data.sources import is_local, split_validation
from d2lora.errors import D2LoraError
from d2lora.evaluation.harness import split_names
from d2lora.runtime.run_folder import METRICS
from d2lora.settings import AdaptSettings, EvaluateSettings, WarmupSettings
from d2lora.study.jobs import Mixed, Scored, Trial, WarmUp
from d2lora.study.plan import ArmPlan, StudyPlan
from d2lora.study.recipes import adapt_settings
from d2lora.study.store import Job, shared_base
from d2lora.training.schedule import StepSchedule, batch_size_of, passes

N_STEPS = 4
"""Optimizer steps that are measured of each kind; the first, which is slow, does not count."""
N_ROWS = 16
"""Rows that are measured of what forgetting is measured on."""
_SHORT: dict[str, Any] = {
    "epochs": None, "max_steps": N_STEPS, "stop_step": None, "validation_fraction": 0.0,
    "validation_data": (),
}  # fmt: skip
S = TypeVar("S", WarmupSettings, AdaptSettings)


class _Step(NamedTuple):
    """What an optimizer step takes, and the tokens that it sees."""

    seconds: float
    n_tokens: float


class Calibration:
    """Estimates the seconds of runs; measures on first use, and only what is needed."""

    def __init__(self, plan: StudyPlan, n_threads: int | None) -> None:
        """Estimate for a plan whose data are named by paths.

        Args:
            plan: The plan.
            n_threads: Threads that a run will have. None: as many as this process.
        """
        self._plan, self._n_threads = plan, n_threads
        self._measured_steps: dict[object, _Step] = {}
        self._scoring_s: dict[str, float] = {}
        self._failed: str | None = None

    @cached_property
    def _obstacle(self) -> str | None:
        """The reason not to load the base and data in a dry run, or None."""
        from d2lora.adapters.base_files import base_folder

        tasks = self._plan.tasks.values()
        files = [f for task in tasks for f in (*task.data, *task.test)]
        files += [*self._plan.general_text, *split_names(self._plan.choices)[0]]
        away = [name for name in files if not is_local(name)]
        if away:
            return f"{away[0]} is not on this machine"
        try:
            folder = base_folder(
                self._plan.base, self._plan.revision, self._plan.gguf_file, fetch=False
            )
        except D2LoraError:
            return f"the base {self._plan.base} is not on this machine"
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        # Weights may be kept in a type of twice the size.
        return f"the base {self._plan.base} may not fit here" if 2 * weights > memory else None

    @property
    def why_not(self) -> str | None:
        """Why nothing can be estimated, or None."""
        return self._obstacle or self._failed

    def seconds(self, job: Job) -> float | None:
        """Return a run's estimated seconds; None where nothing can be measured.

        Merging, mixing, random adapters and existing warm starts count as nothing.
        """
        if self.why_not is not None:
            return None
        try:
            if isinstance(job, WarmUp):
                step, budget = self._warm_up_step(job.settings), job.settings.max_tokens
                n_steps = n_steps_of(job.settings) if budget is None else budget / step.n_tokens
                return n_steps * step.seconds
            total = 0.0
            if isinstance(job, Trial | Scored) and job.training is not None:
                task, n = job.about
                step = self._task_step(task).seconds
                n_runs = job.average_of if isinstance(job, Scored) else 1
                total += n_runs * n_steps_of(job.training) * step
                if isinstance(job, Trial):
                    total += _validations(job.training, n) * step
            if isinstance(job, Scored):
                total += self._scoring(job.about[0], job.tests)
        except D2LoraError as error:
            self._failed = str(error)
            return None
        return total

    def _warm_up_step(self, settings: WarmupSettings) -> _Step:
        from d2lora.warmup import warm_up

        what = (settings.data, settings.batch_size, settings.objective, settings.rank)
        if what not in self._measured_steps:
            n_rows = settings.m or N_ROWS
            size = batch_size_of(n_rows, settings)
            few = settings.changed(
                m=min(n_rows, N_STEPS * size), batch_size=size, select=None, for_task=(),
                max_tokens=None, **_SHORT,
            )  # fmt: skip
            self._measured_steps[what] = self._measured(few, warm_up)
        return self._measured_steps[what]

    def _task_step(self, task: str) -> _Step:
        from d2lora.adaptation import adapt

        if task not in self._measured_steps:
            arm = ArmPlan(kind="fresh", name="fresh")
            few = adapt_settings(self._plan, arm, task, max(self._plan.sizes), 0, Path(), **_SHORT)
            n_rows = max(self._plan.sizes)
            size = batch_size_of(n_rows, few)
            few = few.changed(n=min(n_rows, N_STEPS * size), batch_size=size)
            self._measured_steps[task] = self._measured(few, adapt)
        return self._measured_steps[task]

    def _measured(self, settings: S, phase: Callable[[S, Any], Any]) -> _Step:
        """Run a few steps in a folder of their own; return what one is like."""
        with tempfile.TemporaryDirectory() as folder:
            tried = settings.changed(out=Path(folder) / "tried")
            phase(tried, self._base)
            lines = (tried.out / METRICS).read_text(encoding="utf-8").splitlines()
        steps = [row for row in map(json.loads, lines) if "elapsed_s" in row]
        ends = [row["elapsed_s"] for row in steps]
        # What else the machine does can only make a step longer.
        shortest = min([end - begin for begin, end in pairwise(ends)] or ends)
        return _Step(shortest, steps[-1]["n_tokens"] / len(steps))

    @cached_property
    def _base(self) -> Any:
        import torch

        base = shared_base(self._plan)
        if self._n_threads is not None:
            torch.set_num_threads(self._n_threads)
        return base

    def _scoring(self, task: str, tests: EvaluateSettings) -> float:
        from d2lora.evaluation.measure import BASE, measure
        from d2lora.evaluation.test_sets import TestSets
        from d2lora.runtime.console import Reporter

        if task not in self._scoring_s:
            sets = TestSets.read(tests)
            assert sets.task is not None
            n = min(len(sets.task.rows), tests.limit or len(sets.task.rows))
            few = min(n, tests.batch_size)
            text, choices = sets.general[:N_ROWS], sets.choices[:N_ROWS]
            total = 0.0
            for own, scale in (
                (replace(sets, general=[], choices=[]), n / few),
                (TestSets(None, text, []), len(sets.general) / max(1, len(text))),
                (TestSets(None, [], choices), len(sets.choices) / max(1, len(choices))),
            ):
                started, started_cpu = time.perf_counter(), time.process_time()
                measure(BASE, self._base, own, tests.changed(limit=few), Reporter(quiet=True))
                elapsed = time.perf_counter() - started
                if self._base.model.device.type == "cpu":
                    elapsed = min(elapsed, time.process_time() - started_cpu)  # others' work, again
                total += scale * elapsed
            self._scoring_s[task] = total
        return self._scoring_s[task]


def n_steps_of(settings: WarmupSettings | AdaptSettings) -> int:
    """Return the optimizer steps that a run takes; its rows are counted where they decide."""
    from d2lora.data.reading import read_task

    if settings.max_steps is not None:
        return settings.max_steps if settings.stop_step is None else settings.stop_step
    n = settings.m if isinstance(settings, WarmupSettings) else settings.n
    if n is None:
        n = len(read_task(settings.data, settings.task, skip_bad=True).rows)
    shown, _ = split_validation(range(n), settings.validation_fraction, settings.fold)
    return StepSchedule.of(len(shown), settings, 0).last_step


def n_rows_of(mixed: Mixed) -> int:
    """Return about how many rows a mixture will have."""
    general, own = mixed.general, mixed.training
    sizes = ((general.m or 0, general), (own.n or 0, own))
    return max(1, round(sum(size * passes(size, of) for size, of in sizes)))


def _validations(settings: AdaptSettings, n: int) -> float:
    """Return what a trial's validations cost, in optimizer steps: a forward pass is a third."""
    n_held_out = n / settings.fold[1] if settings.fold else n * settings.validation_fraction
    n_times = 1 + math.ceil(n_steps_of(settings) / max(1, settings.eval_every))
    return n_times * n_held_out / min(n, batch_size_of(n, settings)) / 3
