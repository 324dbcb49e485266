"""The search of a fit, as steps over runs in the store.

1. Learning rates and lengths of every initialization, by the loss on rows held out: all on the
   first fold, the better half of each initialization on twice the folds, and so on (successive
   halving, Jamieson and Talwalkar 2016, arXiv 1502.07943).
2. What the best of each answers to the rows of every fold, beside the base with and without
   examples in its prompt. Test rows decide nothing.
3. Whether the winner answers better where it is trained to the end of its schedule and not to its
   lowest loss: the loss may rise while answers still get better.
4. Whether the average of several runs of the winner loses to one of them.
5. Whether a point on the way from the initialization to there beats its end.
6. The winner, trained on all rows.
7. What half and a quarter of the rows would have brought.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from d2lora.data.reading import TaskData
from d2lora.errors import RunError, counted
from d2lora.fitting.compare import Answers, LearningCurve, mean_of, of_folds
from d2lora.fitting.found import Contender, Fitted, Interpolation, Longer, Soup
from d2lora.fitting.jobs import (
    Averaged,
    AveragedWhole,
    HeldOut,
    Interpolated,
    InterpolatedWhole,
    Prompted,
    Split,
    Trained,
)
from d2lora.fitting.ledger import Ledger
from d2lora.fitting.plan import TASK
from d2lora.fitting.trials import Trials
from d2lora.settings import AdaptSettings, FitSettings
from d2lora.study.cells import BASE, Cell
from d2lora.study.jobs import Scored, Trial
from d2lora.study.needs import Needs
from d2lora.study.steps import Steps
from d2lora.study.store import Job
from d2lora.study.tuning import SearchGrid, Tuned

LEAST_ROWS_OF_CURVE = 16
"""Rows from which on a learning curve is drawn."""


class Search:
    """Leads to what a fit finds; asked again, it starts from the beginning, as all steps do."""

    def __init__(self, settings: FitSettings, needs: Needs, n: int, n_workers: int) -> None:
        """Name the runs' store by `needs`; n are the rows to use."""
        self._settings, self._needs, self._n = settings, needs, n
        self._n_workers = n_workers
        self._arms = [arm.name for arm in needs.plan.arms]
        self._ledger = Ledger(settings.budget_s, n_workers)

    def fitted(self) -> Steps[Fitted]:
        """Lead to the result."""
        self._ledger = Ledger(self._settings.budget_s, self._n_workers)
        found = yield from self._tuned()
        split = Split.of((yield from self._settings_of(found[0], fold=0)), self._n)
        reserve_s = 0.0
        for one in found:
            whole = yield from self._needs.trained_as(self._cell(one.name), one.tuned)
            reserve_s = max(reserve_s, self._ledger.training_s(whole))
        found = yield from self._with_answers(found, split.data, reserve_s)
        prompted = yield from self._prompted(split.data, reserve_s)
        winner = _best(found)
        longer = yield from self._longer(winner, split.data, reserve_s)
        winner = longer.whole if longer is not None and longer.kept else winner
        whole = yield from self._needs.trained_as(self._cell(winner.name), winner.tuned)
        reserve_s = self._ledger.training_s(whole)
        soup = yield from self._soup(winner, split.data, reserve_s)
        n_runs = soup.n_runs if soup is not None and soup.kept else 1
        between = yield from self._interpolated(winner, n_runs, split.data, reserve_s)
        jobs = [
            Trained(f"{winner.name}, final run {run}", (TASK, self._n), self._needs.store, own)
            for run in range(n_runs)
            if (own := whole.changed(seed_order=run))
        ]
        yield from self._run(jobs)
        end: Trained | AveragedWhole = jobs[0]
        if n_runs > 1:
            place = ("average of the final runs", (TASK, 0), self._needs.store)
            end = AveragedWhole(*place, tuple(jobs))
            yield from self._run([end])
        adapter: Trained | AveragedWhole | InterpolatedWhole = end
        if between is not None and between.kept:
            place = ("point on the way", (TASK, 0), self._needs.store)
            adapter = InterpolatedWhole(*place, end, whole.init, between.best)
            yield from self._run([adapter])
        curve = yield from self._curve(winner, split.data)
        tests = yield from self._tests(adapter)
        return Fitted(
            split.data, found, winner, prompted, longer, soup, between,
            [job.training for job in jobs], adapter, curve, tests, self._ledger,
        )  # fmt: skip

    def _run(self, jobs: Sequence[Job]) -> Steps[list[dict[str, Any]]]:
        """Lead to the results of jobs that must not fail."""
        yield from self._try(jobs)
        for job in jobs:
            if job.key in self._needs.failed:
                raise RunError(f"{job.label}: {self._needs.failed[job.key]}")
        return [self._needs.done[job.key] for job in jobs]

    def _try(self, jobs: Sequence[Job]) -> Steps[None]:
        """Lead to the end of jobs, done or failed."""
        yield from self._needs.need_all(jobs)
        self._ledger.note(jobs, self._needs.done)

    def _cell(self, arm: str, n: int | None = None) -> Cell:
        return Cell(arm, TASK, n or self._n, self._settings.seed)

    # 1. Learning rates and lengths

    def _tuned(self) -> Steps[list[Contender]]:
        """Lead to the learning rate and length of every initialization."""
        trials = {arm: Trials(self._needs, self._cell(arm)) for arm in self._arms}
        yield from self._searched(trials, self._n_folds(self._n))
        return [own.chosen(arm) for arm, own in trials.items()]

    def _searched(self, trials: "Mapping[str, Trials]", most_folds: int) -> Steps[None]:
        """Lead to the trials of a search by successive halving."""
        while True:
            jobs: list[Trial] = []
            for own in trials.values():
                jobs += yield from own.wanted()
            if not jobs:
                break
            yield from self._try(jobs)
            for own in trials.values():
                own.take()
        n_folds = 1
        while n_folds < most_folds:
            n_folds = min(2 * n_folds, most_folds)
            jobs = []
            for own in trials.values():
                jobs += yield from own.halved(n_folds)
            new = self._ledger.new(jobs)
            needed_s = self._ledger.training_s(*(job.training for job in new))
            reserve_s = max((self._ledger.training_s(job.training) for job in jobs), default=0.0)
            if not self._ledger.affords(f"trials on {n_folds} folds", needed_s, reserve_s):
                break
            yield from self._try(jobs)
            for own in trials.values():
                own.take()

    # 2. Answers to rows that were held out

    def _with_answers(
        self, found: Sequence[Contender], data: TaskData, reserve_s: float
    ) -> Steps[list[Contender]]:
        """Lead to what every initialization answers, the one of the lowest loss first."""
        answered: dict[str, Answers] = {}
        for one in sorted(found, key=_loss):
            jobs = yield from self._held_out(one)
            needed_s = self._ledger.answering_s(jobs)
            if not self._ledger.affords(f"answers after {one.name}", needed_s, reserve_s):
                continue
            answered[one.name] = of_folds(data, (yield from self._run(jobs)))
        return [replace(one, answers=answered.get(one.name)) for one in found]

    def _prompted(self, data: TaskData, reserve_s: float) -> Steps[dict[str, Answers]]:
        """Lead to what the base answers with and without examples in its prompt."""
        if data.task.answers == "none":
            return {}
        found: dict[str, Answers] = {}
        # Of these settings the folds count alone: the same whatever was tuned.
        any_tuned = Tuned(self._settings.learning_rates[0])
        training = yield from self._folds_of(Contender(self._arms[0], any_tuned, []))
        fewest = min(len(Split.of(own, self._n).trained) for own in training)
        shots = min(self._settings.shots, fewest)
        for n_shots in dict.fromkeys((0, shots)):
            name = f"base, {counted(n_shots, 'example')} in the prompt" if n_shots else "base"
            jobs = [
                Prompted(*self._place(name, fold), own, *self._asked(), shots=n_shots)
                for fold, own in enumerate(training)
            ]
            needed_s = self._ledger.answering_s(jobs, trains=False)
            if not self._ledger.affords(name, needed_s, reserve_s):
                continue
            found[name] = of_folds(data, (yield from self._run(jobs)))
        return found

    def _held_out(
        self, one: Contender, n: int | None = None, order: int = 0
    ) -> Steps[list[HeldOut]]:
        training = yield from self._folds_of(one, n)
        return [
            HeldOut(
                *self._place(f"{one.name}, n = {n or self._n}, order {order}", fold),
                own.changed(seed_order=order), *self._asked(),
            )
            for fold, own in enumerate(training)
        ]  # fmt: skip

    def _n_folds(self, n: int) -> int:
        """Return into how many folds n rows fall: at most one a row."""
        return min(self._settings.folds, n)

    def _folds_of(self, one: Contender, n: int | None = None) -> Steps[list[AdaptSettings]]:
        """Lead to the settings of training without each of the folds."""
        runs: list[AdaptSettings] = []
        for fold in range(self._n_folds(n or self._n)):
            own = yield from self._settings_of(one, fold=fold, n=n)
            runs.append(own)
        return runs

    def _settings_of(
        self, one: Contender, *, fold: int, n: int | None = None
    ) -> Steps[AdaptSettings]:
        n_folds = self._n_folds(n or self._n)
        own = yield from self._needs.trained_as(
            self._cell(one.name, n), one.tuned, fold=(fold, n_folds), keep_best=False
        )
        # The rows left out decide nothing here; to look at them each epoch takes time.
        return own.changed(eval_every=own.max_steps or 1)

    def _place(self, what: str, fold: int) -> tuple[str, tuple[str, int], Any]:
        return f"{what}, fold {fold}", (TASK, self._n), self._needs.store

    def _asked(self) -> tuple[Any, int]:
        """Return how rows left out are answered, and the rows of the fit."""
        none: dict[str, Any] = {
            "data": (),
            "general_text": (),
            "choices": (),
            "limit": None,
            "lm_eval_tasks": None,
        }
        return self._needs.tests(TASK).changed(**none), self._n

    # 3. To the end of the schedule

    def _longer(self, winner: Contender, data: TaskData, reserve_s: float) -> Steps[Longer | None]:
        """Lead to the winner's answers after its whole schedule; None where it ends there."""
        tuned = winner.tuned
        if winner.answers is None or not data.task.metrics or tuned.step in (None, _last(tuned)):
            return None
        whole = replace(winner, tuned=replace(tuned, step=None), answers=None)
        jobs = yield from self._held_out(whole)
        needed_s = self._ledger.answering_s(jobs)
        if not self._ledger.affords("training to the end of the schedule", needed_s, reserve_s):
            return None
        answers = of_folds(data, (yield from self._run(jobs)))
        return Longer(replace(whole, answers=answers), winner)

    # 4. The average of several runs

    def _soup(self, winner: Contender, data: TaskData, reserve_s: float) -> Steps[Soup | None]:
        """Lead to the average of several runs of the winner, compared with one of them."""
        n_runs = self._settings.runs
        if n_runs == 1 or winner.answers is None:
            return None
        jobs: list[list[HeldOut]] = []
        for order in range(n_runs):
            own = yield from self._held_out(winner, order=order)
            jobs.append(own)
        finally_s = (n_runs - 1) * reserve_s
        if not self._ledger.affords(
            f"the average of {n_runs} runs",
            self._ledger.answering_s([job for own in jobs for job in own]) + finally_s,
            reserve_s,
        ):
            return None
        results = yield from self._run([job for own in jobs for job in own])
        n_folds = len(jobs[0])
        singles = [
            of_folds(data, results[i : i + n_folds]) for i in range(0, len(results), n_folds)
        ]
        averaged = yield from self._run(self._averages(winner, jobs))
        return Soup(n_runs, of_folds(data, averaged), mean_of(singles))

    def _averages(self, winner: Contender, jobs: Sequence[Sequence[HeldOut]]) -> list[Averaged]:
        """Return the averages of runs, `jobs[order][fold]`, over orders."""
        return [
            Averaged(
                *self._place(f"{winner.name}, average of {len(jobs)}", fold),
                runs[0].training, *self._asked(), runs,
            )
            for fold, runs in enumerate(zip(*jobs, strict=True))
        ]  # fmt: skip

    # 5. Between the initialization and the trained adapter

    def _interpolated(
        self, winner: Contender, n_runs: int, data: TaskData, reserve_s: float
    ) -> Steps[Interpolation | None]:
        """Lead to answers of points on the way to what was trained: to the average, if it stays."""
        shares = [share for share in self._settings.interpolate if share < 1]
        if not shares or winner.answers is None or winner.tuned.step == 0:
            return None
        orders: list[list[HeldOut]] = []
        for order in range(n_runs):
            own = yield from self._held_out(winner, order=order)
            orders.append(own)
        ends = self._averages(winner, orders) if n_runs > 1 else orders[0]
        jobs = {
            share: [
                Interpolated(
                    *self._place(f"{winner.name}, {share:g} of the way", fold),
                    end.training, *self._asked(), end, share,
                )
                for fold, end in enumerate(ends)
            ]
            for share in shares
        }  # fmt: skip
        every = [job for own in jobs.values() for job in own]
        needed_s = self._ledger.answering_s(every, trains=False)
        if not self._ledger.affords("points between", needed_s, n_runs * reserve_s):
            return None
        end = of_folds(data, (yield from self._run(ends)))
        yield from self._run(every)
        done = self._needs.done
        tried = {s: of_folds(data, [done[job.key] for job in own]) for s, own in jobs.items()}
        return Interpolation(tried, end)

    # 7. The learning curve

    def _curve(self, winner: Contender, data: TaskData) -> Steps[LearningCurve | None]:
        """Lead to the winner's scores after training on a quarter and a half of the rows."""
        if self._n < LEAST_ROWS_OF_CURVE or winner.answers is None:
            return None
        sizes = [self._n // 4, self._n // 2]
        jobs = yield from self._held_out(winner, sizes[0])
        needed_s = 2 * 2 * self._ledger.answering_s(jobs)
        if not self._ledger.affords("the learning curve", needed_s):
            return None
        found: list[Answers] = []
        for n in sizes:
            # Fewer rows may want fewer steps.
            grid = SearchGrid((winner.tuned.learning_rate,), chooses_length=True)
            own = Trials(self._needs, self._cell(winner.name, n), grid)
            yield from self._searched({winner.name: own}, 2)
            held_out = yield from self._held_out(own.chosen(winner.name), n)
            found.append(of_folds(data, (yield from self._run(held_out))))
        trained_on = [n - n / self._n_folds(n) for n in (*sizes, self._n)]
        return LearningCurve.of(trained_on, [*found, winner.answers])

    # The test, once

    def _tests(
        self, adapter: Trained | AveragedWhole | InterpolatedWhole
    ) -> Steps[dict[str, dict[str, Any]]]:
        """Lead to what is measured on test rows, general text and multiple choice."""
        tests = self._needs.tests(TASK)
        if not (tests.data or tests.general_text or tests.choices):
            return {}
        place = ((TASK, 0), self._needs.store, tests)
        jobs = [
            Scored(f"{BASE}, test", *place),
            Scored(f"{adapter.label}, test", *place, adapter=adapter.path),
        ]
        results = yield from self._run(jobs)
        return dict(zip((BASE, "adapter"), results, strict=True))


def _last(tuned: Tuned) -> int:
    return tuned.curve[-1][0] if tuned.curve else 0


def _loss(one: Contender) -> float:
    """Return the lowest loss of the trials on the most folds."""
    most = max(tried.n_folds for tried in one.tried)
    return min(tried.loss for tried in one.tried if tried.n_folds == most)


def _best(found: Sequence[Contender]) -> Contender:
    """Return the winner: by answers where they are there, else by the loss of the trials."""
    answered = [(one, one.answers) for one in found if one.answers is not None]
    if not answered:
        return min(found, key=_loss)
    best, answers = min(answered, key=lambda pair: pair[1].loss)
    # The one of the lowest loss stays, but where the task's own score says otherwise.
    for one, own in answered:
        change = own.change_from(answers)
        if change is not None and change.low > 0:
            best, answers = one, own
    return best
