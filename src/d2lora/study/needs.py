"""What a cell of a study needs: which jobs, one after the other, lead to its result.

warm-up ─▶ (merged base | random adapter | mixed rows | pairs) ─▶ trials ─▶ the cell

The learning rate and the length of a cell are chosen from trials on rows held out of its own n, for
every seed again, so that the noise of tuning is in the spread over seeds. The job that sees the
test rows comes last and decides nothing.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from d2lora.data.reading import read_task
from d2lora.data.sources import split_validation
from d2lora.data.tasks import has_labels
from d2lora.errors import counted
from d2lora.settings import AdaptSettings, BaseSettings, EvaluateSettings, PhaseSettings
from d2lora.study.cells import BASE, Cell
from d2lora.study.jobs import Merged, Mixed, Norms, Paired, Ready, Scored, Trial, WarmUp
from d2lora.study.plan import NEEDS_WARM_UP, UNTRAINED, ArmPlan, StudyPlan
from d2lora.study.recipes import (
    INHERITED,
    adapt_settings,
    base_values,
    pairs_settings,
    warm_up_settings,
)
from d2lora.study.steps import CellFailedError, Steps
from d2lora.study.store import Job, content_of
from d2lora.study.tuning import Candidate, Curve, SearchGrid, Tuned, mean_curve
from d2lora.training.schedule import StepSchedule, batch_size_of

CURVE_POINTS = 12
"""Validation losses in a trial's curve, at most, besides that of the untrained adapter."""
_ALIKE = ("max_length", "overlong", "chat_format")
"""What holds for test rows as for training rows."""


class Needs:
    """Knows what is done and what has failed, and so what a cell needs next.

    Steps raise CellFailedError where a job on their way has failed.
    """

    def __init__(self, plan: StudyPlan, store: Path, *, keep_adapters: bool) -> None:
        """Look for jobs in a store; the plan's files are named by paths that exist there."""
        self.plan, self.store, self.keep_adapters = plan, store, keep_adapters
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self._arms = {arm.name: arm for arm in plan.arms}
        self._tuned: dict[Cell, Tuned] = {}
        self.last: dict[Cell, Scored] = {}
        """The job that scores a cell, once it is known."""
        self._warm_ups: dict[tuple[str, int], WarmUp | Ready] = {}
        self._tests: dict[str, EvaluateSettings] = {}

    def note(self, job: Job, outcome: dict[str, Any] | str) -> None:
        """Note the result of a job, or the reason why it failed."""
        if isinstance(outcome, str):
            self.failed[job.key] = outcome
        else:
            self.done[job.key] = outcome

    def result(self, cell: Cell) -> Steps[dict[str, Any]]:
        """Lead to a cell's result."""
        if cell not in self.last:
            self.last[cell] = yield from self.last_job(cell)
        return (yield from self.need(self.last[cell]))

    def last_job(self, cell: Cell) -> Steps[Scored]:
        """Lead to the job that scores a cell."""
        tests = self.tests(cell.task)
        place = (str(cell), (cell.task, cell.n), self.store)
        if cell.arm == BASE:
            return Scored(*place, tests)
        arm = self._arms[cell.arm]
        warm_up = yield from self.warm_up_of(arm, cell.seed)
        if arm.kind == "warm_only":
            assert warm_up is not None
            return Scored(*place, tests, adapter=warm_up.path)
        if arm.kind == "few_shot":
            shots = adapt_settings(self.plan, arm, cell.task, cell.n, cell.seed, Path())
            return Scored(*place, tests, shots=shots)
        tuned = yield from self.tuned(cell)
        training = yield from self.trained_as(cell, tuned)
        return Scored(
            *place, tests, training, average_of=arm.average_of, share=arm.interpolate,
            keep=self.keep_adapters,
        )  # fmt: skip

    def trained_as(self, cell: Cell, tuned: Tuned, **values: Any) -> Steps[AdaptSettings]:
        """Lead to the settings of a cell's training at a learning rate and length."""
        warm_up = yield from self.warm_up_of(self._arms[cell.arm], cell.seed)
        whole = yield from self.training(cell, warm_up, **self.recipe(cell, tuned), **values)
        step = tuned.stop_of(_n_steps(cell.n, whole))
        end: dict[str, Any] = {"stop_step": step} if step != 0 else {"max_steps": 0}
        return whole.changed(**end)

    def tuned(self, cell: Cell) -> Steps[Tuned]:
        """Lead to the learning rate and length of a cell: given, or those of the lowest loss.

        A candidate of which any fold failed, as one at which training diverges, is out.
        """
        if cell not in self._tuned:
            grid = self.grid(cell)
            if len(grid.learning_rates) == 1 and not grid.chooses_length:
                self._tuned[cell] = Tuned(grid.learning_rates[0])
            else:
                chosen = Tuned.of(grid, (yield from self._searched(cell, grid)))
                if chosen is None:
                    trials = (yield from self.trials(cell)).values()
                    reasons = (self.failed.get(job.key) for jobs in trials for job in jobs)
                    reason = next(filter(None, reasons), f"no row of n = {cell.n} can be held out")
                    raise CellFailedError(f"no learning rate could be used: {reason}")
                self._tuned[cell] = chosen
        return self._tuned[cell]

    def trials(self, cell: Cell) -> Steps[dict[Candidate, list[Trial]]]:
        """Lead to the trials behind the tuned settings, one job a fold; empty: none was needed."""
        found: dict[Candidate, list[Trial]] = {}
        if self.tunes(cell):
            grid = self.grid(cell)
            for candidate in (yield from self._searched(cell, grid)):
                found[candidate] = yield from self.trial_jobs(cell, grid, candidate)
        return found

    def tunes(self, cell: Cell) -> bool:
        """Say whether anything is tuned for a cell."""
        if cell.arm == BASE or self._arms[cell.arm].kind in UNTRAINED:
            return False
        grid = self.grid(cell)
        return len(grid.learning_rates) > 1 or grid.chooses_length

    def grid(self, cell: Cell) -> SearchGrid:
        """Return the learning rates and lengths that are searched for a cell."""
        given = self.plan.learning_rate_of(cell.task, cell.arm, cell.n)
        tried = self.plan.learning_rates if given is None else (given,)
        return SearchGrid(tuple(sorted(set(tried))), chooses_length=bool(self.plan.steps))

    def _searched(self, cell: Cell, grid: SearchGrid) -> Steps[dict[Candidate, Curve | None]]:
        """Lead to the curves of all that the search tries."""
        tried: dict[Candidate, Curve | None] = {}
        while new := grid.wanted(tried):
            jobs: dict[Candidate, list[Trial]] = {}
            for candidate in new:
                jobs[candidate] = yield from self.trial_jobs(cell, grid, candidate)
            yield from self.need_all([job for folds in jobs.values() for job in folds])
            for candidate, folds in jobs.items():
                results = [self.done.get(job.key) for job in folds]
                curves = [result["curve"] for result in results if result is not None]
                tried[candidate] = mean_curve(curves) if len(curves) == len(folds) else None
        return tried

    def trial_jobs(self, cell: Cell, grid: SearchGrid, candidate: Candidate) -> Steps[list[Trial]]:
        """Lead to the trials of a candidate, one a fold."""
        arm, learning_rate = self._arms[cell.arm], grid.learning_rate(candidate.place)
        warm_up = yield from self.warm_up_of(arm, cell.seed)
        recipe = self.recipe(cell, Tuned(learning_rate, candidate.doublings))
        n_folds = min(self.plan.folds, cell.n)
        parts: list[dict[str, Any]] = [{"fold": (fold, n_folds)} for fold in range(n_folds)]
        if n_folds == 1:
            parts = [{"validation_fraction": self.plan.validation_fraction}]
        trials: list[Trial] = []
        for number, part in enumerate(parts):
            training = yield from self.training(cell, warm_up, **recipe, **part)
            n_steps = _n_steps(cell.n, training)
            every = max(1, math.ceil(n_steps / CURVE_POINTS))
            # What is read is the curve, so no weights are kept but for stopping early.
            training = training.changed(eval_every=every, keep_best=training.patience > 0)
            label = (
                f"{cell}, trial of {learning_rate:g}, {counted(n_steps, 'step')}"
                + f", fold {number}" * bool(number)
            )
            trials.append(Trial(label, (cell.task, cell.n), self.store, training))
        return trials

    def recipe(self, cell: Cell, tuned: Tuned) -> dict[str, Any]:
        """Return the settings of a learning rate and length, the schedule whole."""
        longest = self.plan.steps_of(cell.n)
        length = {} if longest is None else {"max_steps": longest * 2**tuned.doublings}
        return {"learning_rate": tuned.learning_rate, **length}

    def training(
        self, cell: Cell, warm_up: WarmUp | Ready | None, **values: Any
    ) -> Steps[AdaptSettings]:
        """Lead to the settings of a cell's training: each arm's initialization and rows."""
        arm = self._arms[cell.arm]
        plain = adapt_settings(self.plan, arm, cell.task, cell.n, cell.seed, Path(), **values)
        if warm_up is None:
            return (yield from self._with_pairs(cell, plain, None))
        changes: dict[str, Any]
        match arm.kind:
            case "longer":
                result = yield from self.need(warm_up)
                n_steps = _n_steps(cell.n, plain) + result["cost"]["n_steps"]
                changes = {"epochs": None, "max_steps": n_steps}
            case "merged":
                whole = self._base().changed(quantization=None)  # quantized again as it is loaded
                merged = Merged(f"{arm.warm_up}, merged", ("", 0), self.store, whole, warm_up)
                yield from self.need(merged)
                changes = {"base": str(merged.path)}
            case "mixed":
                assert isinstance(warm_up, WarmUp), "checked with the plan"
                place = (cell.task, cell.n)
                mixed = Mixed(f"{cell}, rows", place, self.store, warm_up.settings, plain)
                n_rows = (yield from self.need(mixed))["n_rows"]
                holds_out = plain.validation_fraction or plain.fold
                changes = {
                    "data": (str(mixed.path),), "task": "instruct", "n": None, "fold": None,
                    "epochs": None, "max_steps": math.ceil(n_rows / batch_size_of(n_rows, plain)),
                    "validation_fraction": 0.0,
                    "validation_data": (str(mixed.held_out),) if holds_out else (),
                }  # fmt: skip
            case "norms":
                norms = Norms(f"{arm.warm_up}, random", ("", 0), self.store, warm_up, cell.seed)
                yield from self.need(norms)
                changes = {"init": str(norms.path), **INHERITED}
            case _:
                scale = 0.0 if arm.kind == "warm_a" else plain.init_scale
                changes = {"init": str(warm_up.path), "init_scale": scale, **INHERITED}
        return (yield from self._with_pairs(cell, plain.changed(**changes), warm_up))

    def _with_pairs(
        self, cell: Cell, plain: AdaptSettings, warm_up: WarmUp | Ready | None
    ) -> Steps[AdaptSettings]:
        """Replace the n rows by preference pairs made of them, where the objective needs pairs."""
        if _learns_as_is(plain):
            return plain
        adapter = warm_up.path if warm_up and plain.init == str(warm_up.path) else None
        longest = {"max_new_tokens": self.plan.tasks[cell.task].max_new_tokens}
        made = pairs_settings(self.plan, plain, cell.n, adapter, **longest)
        place = (cell.task, cell.n)
        pairs = Paired(f"{cell}, pairs", place, self.store, made)
        yield from self.need(pairs)
        return plain.changed(data=(str(pairs.path),), task="preferences", n=None)

    def warm_up_of(self, arm: ArmPlan, seed: int) -> Steps[WarmUp | Ready | None]:
        """Lead to an arm's warm-up, done; None where its kind needs none."""
        if arm.kind not in NEEDS_WARM_UP:
            return None
        name = arm.warm_up or ""
        which = name, seed % self.plan.warm_up_seeds_of(name)
        if which not in self._warm_ups:
            job = yield from self.warm_up(*which)
            yield from self.need(job)
            self._warm_ups[which] = job
        return self._warm_ups[which]

    def warm_up(self, name: str, seed: int = 0) -> Steps[WarmUp | Ready]:
        """Lead to the job that makes a warm start, or uses an existing one."""
        ready = self.plan.ready(name)
        if ready is not None:
            return Ready(f"warm-up {name}", ("", 0), self.store, ready)
        label = f"{name}, seed {seed}" if seed else name
        settings = warm_up_settings(self.plan, name, Path(), seed)
        place = ("", settings.m or 0)
        if not _learns_as_is(settings):
            made = pairs_settings(self.plan, settings, settings.m, None)
            pairs = Paired(f"pairs for {label}", place, self.store, made)
            yield from self.need(pairs)
            changes = {"data": (str(pairs.path),), "task": "preferences", "m": None}
            settings = settings.changed(**changes)
        return WarmUp(f"warm-up {label}", place, self.store, settings)

    def _base(self) -> BaseSettings:
        return BaseSettings(**base_values(self.plan))

    def tests(self, name: str) -> EvaluateSettings:
        """Return how a task's adapters are scored."""
        if name not in self._tests:
            self._tests[name] = self._test_settings(name)
        return self._tests[name]

    def _test_settings(self, name: str) -> EvaluateSettings:
        task = self.plan.tasks[name]
        own = {**self.plan.adapt, **task.adapt}
        values: dict[str, Any] = {
            **dict(self._base()),
            "out": Path(),
            "data": task.test,
            "task": task.task,
            "training_data": task.data if has_labels(task.task) else (),
            "limit": task.n_test,
            "general_text": self.plan.general_text,
            "choices": self.plan.choices,
            "lm_eval_tasks": self.plan.lm_eval_tasks,
            "max_new_tokens": task.max_new_tokens,
            **{name: own[name] for name in _ALIKE if name in own},
            "quiet": True,
        }
        return EvaluateSettings.unchecked(values)  # of a fit without test rows, how it answers

    def need(self, job: Job) -> Steps[dict[str, Any]]:
        """Lead to the result of a job that must not fail."""
        yield from self.need_all([job])
        if job.key in self.failed:
            raise CellFailedError(f"{job.label}: {self.failed[job.key]}")
        return self.done[job.key]

    def need_all(self, jobs: Sequence[Job]) -> Steps[None]:
        """Lead to the end of jobs, done or failed."""
        missing = self.look_for(jobs)
        if missing:
            yield missing

    def look_for(self, jobs: Sequence[Job]) -> list[Job]:
        """Look for results in the store; return the jobs that are neither there nor failed."""
        missing: list[Job] = []
        for job in jobs:
            if job.key in self.done or job.key in self.failed:
                continue
            result = job.result()
            if result is None:
                missing.append(job)
            else:
                self.done[job.key] = result
        return missing


def _n_steps(n: int, settings: AdaptSettings) -> int:
    """Return the optimizer steps of a run on n rows, validation rows among them."""
    shown, _ = split_validation(range(n), settings.validation_fraction, settings.fold)
    return StepSchedule.of(len(shown), settings, 0).n_steps


def _learns_as_is(settings: PhaseSettings) -> bool:
    """Say whether an objective finds what it learns from in the rows: preferences, or none."""
    if settings.objective == "sft":
        return True
    contents = tuple(content_of(name) for name in settings.data)
    return _hold_preferences(settings.data, settings.task, contents)


@cache
def _hold_preferences(data: tuple[str, ...], task: str, contents: tuple[str, ...]) -> bool:
    assert len(contents) == len(data)
    return read_task(data, task).task.answers == "pairs"
