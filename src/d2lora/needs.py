"""What a cell of a study needs: which jobs, one after the other, lead to its result.

warm-up ─▶ (merged base | random adapter | mixed rows | pairs) ─▶ trials of rates ─▶ the cell

The rate of an arm at a size is chosen from trials on validation rows out of the n; the job that
sees the test rows comes last and decides nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from d2lora.data import split_validation
from d2lora.jobs import Merged, Mixed, Norms, Paired, Scored, Trial, WarmUp
from d2lora.plan import (
    NEEDS_WARM_UP,
    UNTRAINED,
    ArmPlan,
    StudyPlan,
)
from d2lora.recipes import adapt_settings, base_values, pairs_settings, warm_up_settings
from d2lora.schedule import Plan
from d2lora.settings import AdaptSettings, BaseSettings, EvaluateSettings, PhaseSettings
from d2lora.store import Job
from d2lora.tasks import read_task

CURVE_POINTS = 8
"""Validation losses in a trial's curve."""
_INHERITED = {"rank": None, "alpha": None, "targets": None}
"""What an arm takes over from a warm start, whatever the plan says of fresh ones."""
_LENGTHS = ("max_length", "overlong")
"""What holds for test rows as for training rows."""
BASE = "base"
"""The arm of the base alone, without examples: what forgetting is measured against."""


@dataclass(frozen=True)
class Cell:
    """Arm x task x n x seed. n is 0 where no task row is used."""

    arm: str
    task: str
    n: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, {self.task}, n = {self.n}, seed {self.seed}"


class Missing(Exception):  # noqa: N818  # no error: it says what to run next
    """Jobs have to be run before a cell can go on."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Name the jobs."""
        super().__init__()
        self.jobs = jobs


class CellFailedError(Exception):
    """A job that a cell needs has failed; the text is the reason."""


def cells_of(plan: StudyPlan) -> list[Cell]:
    """Return all cells of a plan; the base alone comes first of every task."""
    cells: list[Cell] = []
    for task in plan.tasks:
        cells.append(Cell(BASE, task, 0, 0))
        for arm in plan.arms:
            if arm.kind == "warm_only":
                cells.append(Cell(arm.name, task, 0, 0))
                continue
            sizes = (plan.shots,) if arm.kind == "few_shot" else plan.sizes
            cells += [Cell(arm.name, task, n, seed) for n in sizes for seed in range(plan.seeds)]
    return cells


class Needs:
    """Knows what is done and what has failed, and tells what a cell needs next."""

    def __init__(self, plan: StudyPlan, store: Path, *, keep_adapters: bool) -> None:
        """Plan jobs in a store; the plan's files are named by paths that exist there."""
        self.plan, self.store, self.keep_adapters = plan, store, keep_adapters
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self._arms = {arm.name: arm for arm in plan.arms}

    def result(self, cell: Cell) -> dict[str, Any]:
        """Return a cell's result.

        Raises:
            Missing: If jobs have to be run first.
            CellFailedError: If one of them has failed.
        """
        return self._need(self.last_job(cell))

    def last_job(self, cell: Cell) -> Scored:
        """Return the job that scores a cell; raises as `result` for those before it."""
        tests = self._tests(cell.task)
        place = (str(cell), (cell.task, cell.n), self.store)
        if cell.arm == BASE:
            return Scored(*place, tests)
        arm = self._arms[cell.arm]
        warm_up = self._warm_up(arm) if arm.kind in NEEDS_WARM_UP else None
        if arm.kind == "warm_only":
            assert warm_up is not None
            return Scored(*place, tests, adapter=warm_up.path)
        if arm.kind == "few_shot":
            shots = adapt_settings(self.plan, arm, cell.task, cell.n, cell.seed, Path())
            return Scored(*place, tests, shots=shots)
        rate = self.rate(cell)
        training = self._training(cell, warm_up, learning_rate=rate)
        return Scored(*place, tests, training, keep=self.keep_adapters)

    def trials(self, cell: Cell) -> list[Trial]:
        """Return the trials behind the rate of a cell's arm, task and n; empty: rate given."""
        if cell.arm == BASE or self._arms[cell.arm].kind in UNTRAINED:
            return []
        if self._given(cell) is not None:
            return []
        arm = self._arms[cell.arm]
        warm_up = self._warm_up(arm) if arm.kind in NEEDS_WARM_UP else None
        return [
            self._trial(cell, seed, rate, warm_up)
            for rate in self.plan.learning_rates
            for seed in range(min(self.plan.tuning_seeds, self.plan.seeds))
        ]

    def rate(self, cell: Cell) -> float:
        """Return the learning rate of a cell: given, or that of the lowest validation loss.

        A rate with which any trial failed, as one at which training diverges, is out.
        """
        given = self._given(cell)
        if given is not None:
            return given
        trials = self.trials(cell)
        self.need_all(trials)
        losses: dict[float, list[float]] = {}
        for trial in trials:
            result = self.done.get(trial.key)
            loss = math.inf if result is None else result["validation_loss_after"]
            losses.setdefault(trial.training.learning_rate, []).append(loss)
        means = {rate: sum(values) / len(values) for rate, values in losses.items()}
        best = min(sorted(means), key=lambda rate: means[rate])
        if not math.isfinite(means[best]):
            reason = next(self.failed[t.key] for t in trials if t.key in self.failed)
            raise CellFailedError(f"no learning rate could be used: {reason}")
        return best

    def _given(self, cell: Cell) -> float | None:
        by_size = self.plan.rates.get(cell.task, {}).get(cell.arm)
        if by_size:
            n = max(cell.n, 1)
            return by_size[min(by_size, key=lambda size: max(size / n, n / size))]
        if len(self.plan.learning_rates) == 1:
            return self.plan.learning_rates[0]
        return None

    def _trial(self, cell: Cell, seed: int, rate: float, warm_up: WarmUp | None) -> Trial:
        own = Cell(cell.arm, cell.task, cell.n, seed)
        held_out = {"validation_fraction": self.plan.validation_fraction}
        training = self._training(own, warm_up, learning_rate=rate, **held_out)
        every = max(1, _n_steps(cell.n, training) // CURVE_POINTS)
        label = f"{own}, trial of {rate:g}"
        return Trial(label, (cell.task, cell.n), self.store, training.changed(eval_every=every))

    def _training(self, cell: Cell, warm_up: WarmUp | None, **values: Any) -> AdaptSettings:
        """Return the settings of a cell's training: how each arm begins, and on what."""
        arm = self._arms[cell.arm]
        plain = adapt_settings(self.plan, arm, cell.task, cell.n, cell.seed, Path(), **values)
        if warm_up is None:
            init = arm.init or plain.init
            return self._with_pairs(cell, plain.changed(init=init), None)
        changes: dict[str, Any]
        match arm.kind:
            case "longer":
                more = self._need(warm_up)["cost"]["n_steps"]
                changes = {"max_steps": _n_steps(cell.n, plain) + more}
            case "merged":
                merged = Merged(
                    f"{arm.warm_up}, merged", ("", 0), self.store, self._base(), warm_up
                )
                self._need(merged)
                changes = {"base": str(merged.path)}
            case "mixed":
                place = (cell.task, cell.n)
                mixed = Mixed(f"{cell}, rows", place, self.store, warm_up.settings, plain)
                self._need(mixed)
                held_out = (str(mixed.held_out),) if plain.validation_fraction else ()
                changes = {
                    "data": (str(mixed.path),), "task": "instruct", "n": None, "epochs": 1.0,
                    "validation_fraction": 0.0, "validation_data": held_out,
                }  # fmt: skip
            case "norms":
                norms = Norms(f"{arm.warm_up}, random", ("", 0), self.store, warm_up, cell.seed)
                self._need(norms)
                changes = {"init": str(norms.path), **_INHERITED}
            case _:
                scale = 0.0 if arm.kind == "warm_a" else plain.init_scale
                changes = {"init": str(warm_up.path), "init_scale": scale, **_INHERITED}
        return self._with_pairs(cell, plain.changed(**changes), warm_up)

    def _with_pairs(
        self, cell: Cell, plain: AdaptSettings, warm_up: WarmUp | None
    ) -> AdaptSettings:
        """Put pairs of the n rows in the place of the rows where preferences are to be learnt."""
        if _learns_as_is(plain):
            return plain
        adapter = warm_up.path if warm_up and plain.init == str(warm_up.path) else None
        longest = {"max_new_tokens": self.plan.tasks[cell.task].max_new_tokens}
        made = pairs_settings(self.plan, plain, cell.n, adapter, **longest)
        place = (cell.task, cell.n)
        pairs = Paired(f"{cell}, pairs", place, self.store, made)
        self._need(pairs)
        return plain.changed(data=(str(pairs.path),), task="preferences", n=None)

    def _warm_up(self, arm: ArmPlan) -> WarmUp:
        job = self.warm_up(arm.warm_up or "")
        self._need(job)
        return job

    def warm_up(self, name: str) -> WarmUp:
        """Return the job that makes a warm start."""
        settings = warm_up_settings(self.plan, name, Path())
        place = ("", settings.m or 0)
        if not _learns_as_is(settings):
            made = pairs_settings(self.plan, settings, settings.m, None)
            pairs = Paired(f"pairs for {name}", place, self.store, made)
            self._need(pairs)
            changes = {"data": (str(pairs.path),), "task": "preferences", "m": None}
            settings = settings.changed(**changes)
        return WarmUp(f"warm-up {name}", place, self.store, settings)

    def _base(self) -> BaseSettings:
        return BaseSettings(**base_values(self.plan))

    def _tests(self, name: str) -> EvaluateSettings:
        task = self.plan.tasks[name]
        own = {**self.plan.adapt, **task.adapt}
        return EvaluateSettings(
            **dict(self._base()),
            out=Path(),
            data=task.test,
            task=task.task,
            limit=task.n_test,
            general_text=self.plan.general_text,
            choices=self.plan.choices,
            max_new_tokens=task.max_new_tokens,
            **{name: own[name] for name in _LENGTHS if name in own},
            quiet=True,
        )

    def _need(self, job: Job) -> dict[str, Any]:
        self.need_all([job])
        if job.key in self.failed:
            raise CellFailedError(f"{job.label}: {self.failed[job.key]}")
        return self.done[job.key]

    def need_all(self, jobs: Sequence[Job]) -> None:
        """Look for results in the store; what is neither there nor failed is missing."""
        missing: list[Job] = []
        for job in jobs:
            if job.key in self.done or job.key in self.failed:
                continue
            result = job.result()
            if result is None:
                missing.append(job)
            else:
                self.done[job.key] = result
        if missing:
            raise Missing(missing)


def _n_steps(n: int, settings: AdaptSettings) -> int:
    """Return the optimizer steps of a run on n rows, validation rows among them."""
    shown, _ = split_validation(range(n), settings.validation_fraction)
    return Plan.of(len(shown), settings, 0).n_steps


def _learns_as_is(settings: PhaseSettings) -> bool:
    """Say whether an objective finds what it learns from in the rows: preferences, or none."""
    return settings.objective == "sft" or _hold_preferences(settings.data, settings.task)


@cache
def _hold_preferences(data: tuple[str, ...], task: str) -> bool:
    return read_task(data, task).task.score == "preference"
