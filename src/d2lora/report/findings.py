"""Findings of a study, as records: levels (arm x task x n), comparisons, convergence, cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2lora.evaluation.crossed import NO_VERDICT, NOTHING_SEEN, Pooled, Power
from d2lora.evaluation.metrics import title_of
from d2lora.evaluation.stats import Difference, Interval
from d2lora.report.numbers import CI, p_text, range_text, signed
from d2lora.study.plan import StudyPlan

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """One arm on one task at one n: what was measured of its S seeds and I test items."""

    task: str
    arm: str
    kind: str
    n: int
    seeds: tuple[int, ...]
    """Those that are finished, ascending."""
    scores: Array
    """Main score, shape (S, I), 0 to 1."""
    interval: Interval
    """Mean over items of the mean over seeds."""
    learning_rates: tuple[float, ...]
    """Of each seed; empty where nothing was trained."""
    general_loss_change: Array | None
    """Shape (S,): loss on general text minus the base's, nats per token."""
    mc_accuracy_change: Difference | None
    """Multiple-choice accuracy minus the base's."""
    costs: tuple[dict[str, Any], ...]
    """Of each seed, as in manifests; empty where nothing was trained."""
    folders: tuple[str | None, ...]
    """Adapter of each seed, where kept."""

    @property
    def by_seed(self) -> list[float]:
        """Mean score of each seed."""
        return self.scores.mean(axis=1).tolist()

    @property
    def flops_per_step(self) -> float:
        """Operations of an optimizer step, mean over seeds; 0 where none was taken, or NaN."""
        steps = sum(cost["n_steps"] for cost in self.costs)
        return sum(flops_of(cost) for cost in self.costs) / steps if steps else 0.0


@dataclass(frozen=True)
class Comparison:
    """An arm against its reference on one task at one n, paired by item and seed."""

    task: str
    arm: str
    against: str
    n: int
    difference: Difference
    p_value: float
    p_holm: float
    """Adjusted over all comparisons of the study, pooled ones among them (Holm 1979)."""
    power: Power | None
    """What it would take to detect one point."""

    @property
    def verdict(self) -> str:
        """`helps`, `hurts` or `no difference seen`, over items and seeds.

        The interval and Holm's test must agree.
        """
        return _confirmed(self.difference.verdict, self.p_holm)

    @property
    def numbers(self) -> str:
        """The difference and its intervals, in points."""
        d = self.difference
        rows = f"over test rows alone {range_text(d.low, d.high)}"
        wide = rows if d.over_seeds is None else f"{CI} {range_text(*d.over_seeds)}; {rows}"
        return f"{signed(100 * d.mean)} points, {wide}"

    @property
    def seeds(self) -> str:
        """The directions of the seeds; empty where all agree."""
        d = self.difference
        if d.n_seeds == 1:
            return "one seed"
        if d.n_seeds in (d.n_above, d.n_equal, d.n_below):
            return ""
        parts = ((d.n_above, "above zero"), (d.n_equal, "equal"), (d.n_below, "below zero"))
        return f"of {d.n_seeds} seeds {', '.join(f'{n} {word}' for n, word in parts if n)}"


@dataclass(frozen=True)
class PooledComparison:
    """An arm against its reference over all tasks and sizes."""

    arm: str
    against: str
    tasks: tuple[str, ...]
    sizes: tuple[int, ...]
    pooled: Pooled
    p_holm: float
    """Adjusted over all comparisons of the study."""

    @property
    def verdict(self) -> str:
        """`helps`, `hurts` or `no difference seen`: the interval and Holm's test must agree."""
        return _confirmed(self.pooled.verdict, self.p_holm)

    @property
    def numbers(self) -> str:
        """The difference, its interval in points, and p."""
        mean = f"{signed(100 * self.pooled.mean)} points"
        if self.pooled.interval is None or self.pooled.p_value is None:
            return mean
        return f"{mean}, {CI} {range_text(*self.pooled.interval)}, {p_text(self.pooled.p_value)}"

    @property
    def place(self) -> str:
        """What it is the mean over."""
        n_tasks, n_sizes = len(self.tasks), len(self.sizes)
        tasks = f"{n_tasks} task{'s' if n_tasks > 1 else ''}"
        return f"{tasks} and {n_sizes} size{'s' if n_sizes > 1 else ''}"


@dataclass(frozen=True)
class Reached:
    """When one seed's trials reach the reference's lowest validation loss."""

    seed: int
    reference_steps: float
    """Steps after which the reference first reached that loss."""
    steps: float | None
    """Steps of the arm; None: it does not reach it."""
    whole: float
    """Steps of the arm's whole trial."""


@dataclass(frozen=True)
class Convergence:
    """How soon an arm's trials reach the reference's lowest validation loss, seed by seed."""

    task: str
    arm: str
    against: str
    n: int
    seeds: tuple[Reached, ...]
    curves: dict[str, list[tuple[float, float]]]
    """Arm and reference -> (step, validation loss) of the chosen trials, mean of the seeds."""

    @property
    def n_reached(self) -> int:
        """Seeds in which the arm reaches it."""
        return sum(seed.steps is not None for seed in self.seeds)

    @property
    def ratio(self) -> float | None:
        """Mean over seeds of the arm's steps by the reference's; None: not with every seed."""
        ratios = [
            seed.steps / seed.reference_steps
            for seed in self.seeds
            if seed.steps is not None and seed.reference_steps
        ]
        return float(np.mean(ratios)) if ratios and len(ratios) == len(self.seeds) else None


@dataclass(frozen=True)
class Efficiency:
    """How many rows the reference needs to score what an arm scores with n."""

    task: str
    arm: str
    against: str
    n: int
    equals: float | None
    """Rows of the reference; None: more than the largest size tried."""


def flops_of(cost: Mapping[str, Any]) -> float:
    """Return a run's operations; NaN where they are not known."""
    return math.nan if cost["flops"] is None else cost["flops"]


@dataclass(frozen=True)
class ArmCost:
    """What an arm cost at one n, training alone, mean over tasks and seeds.

    Operations are NaN where they are not known.
    """

    arm: str
    n: int
    flops_per_task: float
    training_s_per_task: float
    n_tokens_per_task: float
    n_trainable_parameters: int
    peak_memory_bytes: int
    """The highest of all runs; of a process it counts libraries and base, too."""
    warm_up_flops: float
    """Paid once for all tasks."""
    n_tasks: int
    """Tasks of the study that share it."""
    flops_saved_per_task: float | None
    """Mean over tasks and seeds of what the reference takes to its lowest validation loss, less
    what the arm takes to the same; None: not measured."""

    @property
    def amortised_flops(self) -> float:
        """Operations of one task with its share of the warm-up."""
        return self.flops_per_task + self.warm_up_flops / self.n_tasks

    @property
    def break_even_tasks(self) -> float:
        """Tasks after which the warm-up has paid off in operations; may be infinite, or NaN."""
        if not self.flops_saved_per_task or self.flops_saved_per_task <= 0:
            return math.inf
        return self.warm_up_flops / self.flops_saved_per_task


@dataclass(frozen=True)
class Findings:
    """Everything that a report shows."""

    path: Path
    plan: StudyPlan
    levels: list[Level]
    comparisons: list[Comparison]
    pooled: list[PooledComparison]
    convergence: list[Convergence]
    efficiency: list[Efficiency]
    costs: list[ArmCost]
    score_of: dict[str, str]
    """Task -> name of its main score's column."""
    trials: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    """Of each cell: the learning rate and step chosen, and the curve that they were tuned by."""
    warm_ups: dict[str, Any]
    failures: dict[str, str]
    contamination: list[dict[str, Any]]
    """Of each warm-up and task: training rows checked and removed, as `Check.to_json`."""
    provenance: dict[str, Any]
    store: Path
    n_unfinished: int
    """Cells that are still to be run; those of failed ones not counted."""
    cells: list[dict[str, Any]]
    """Finished cells as in results.jsonl; `key` names the folder of one in the store."""

    def level(self, task: str, arm: str, n: int) -> Level | None:
        """Return one level, or None where no cell of it is finished."""
        found = (v for v in self.levels if (v.task, v.arm, v.n) == (task, arm, n))
        return next(found, None)

    def title(self, task: str) -> str:
        """Return a task's display name."""
        return self.plan.tasks[task].title or task

    def score_name(self, task: str) -> str:
        """Return the main score's display name."""
        return title_of(self.score_of[task])

    def not_compared(self) -> list[tuple[str, str, str, int]]:
        """Return (task, arm, reference, n) where both were measured, but with unequal seeds."""
        compared = {(c.task, c.arm, c.n) for c in self.comparisons}
        return [
            (v.task, v.arm, other, v.n)
            for v in self.levels
            if (other := references(self.plan).get(v.arm)) is not None
            and (v.task, v.arm, v.n) not in compared
            and self.level(v.task, other, v.n) is not None
        ]

    def verdicts(self) -> list[str]:
        """Return the findings as sentences, pooled and then one per comparison."""
        return [*self.pooled_verdicts(), *(self._sentence(c) for c in self.comparisons)]

    def pooled_verdicts(self) -> list[str]:
        """Return the pooled findings over all tasks and sizes, one sentence per pair of arms."""
        return [
            f"Pooled over {c.place}: {_verdict_text(c.verdict, c.arm, c.against)} ({c.numbers})"
            for c in self.pooled
        ]

    def _sentence(self, c: Comparison) -> str:
        place = f"{self.title(c.task)}, n = {c.n}"
        seeds = f"; {c.seeds}" if c.seeds else ""
        return f"{place}: {_verdict_text(c.verdict, c.arm, c.against)} ({c.numbers}{seeds})"


def _confirmed(verdict: str, p_holm: float) -> str:
    """Return the verdict of an interval where the adjusted test agrees."""
    return verdict if verdict == NO_VERDICT or p_holm < 0.05 else NOTHING_SEEN


def _verdict_text(verdict: str, arm: str, against: str) -> str:
    if verdict in (NOTHING_SEEN, NO_VERDICT):
        return f"{verdict} between {arm} and {against}"
    return f"{arm} {verdict} compared with {against}"


def references(plan: StudyPlan) -> dict[str, str]:
    """Return what each arm is compared with."""
    first = plan.arms[0].name
    wanted = {arm.name: arm.against or first for arm in plan.arms}
    return {arm: other for arm, other in wanted.items() if arm != other}
