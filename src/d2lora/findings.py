"""What a study found: a pure function of its folder's files.

study folder ─▶ levels (arm x task x n) ─▶ comparisons, convergence, data efficiency, cost
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2lora.errors import RunError
from d2lora.plan import NEEDS_WARM_UP, StudyPlan
from d2lora.runs import read_json
from d2lora.stats import (
    Difference,
    Interval,
    Power,
    holm,
    mean_interval,
    paired_difference,
    permutation_p,
    power,
    size_that_scores,
    steps_to_reach,
)

Array = NDArray[np.float64]
BASE = "base"
MAIN_SCORES = {"exact_match": "exact match", "rougeL": "ROUGE-L", "accuracy": "accuracy"}
"""Main scores, the first that a task has is taken, and their names."""


@dataclass(frozen=True)
class Level:
    """One arm on one task at one n: what was measured of its S seeds and I test items."""

    task: str
    arm: str
    kind: str
    n: int
    scores: Array
    """Main score, shape (S, I), 0 to 1."""
    interval: Interval
    """Mean over items of the mean over seeds."""
    learning_rate: float | None
    general_loss_change: Array | None
    """Shape (S,): loss on general text minus the base's, nats per token."""
    choices_change: Difference | None
    """Multiple-choice accuracy minus the base's."""
    costs: tuple[dict[str, Any], ...]
    """Of each seed, as in manifests; empty where nothing was trained."""
    folders: tuple[str | None, ...]
    """Adapter of each seed, where kept."""

    @property
    def by_seed(self) -> list[float]:
        """Mean score of each seed."""
        return self.scores.mean(axis=1).tolist()

    def mean_cost(self, name: str) -> float | None:
        """Return a cost's mean over seeds."""
        return float(np.mean([cost[name] for cost in self.costs])) if self.costs else None


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
    """Adjusted over the sizes of this task and arm."""
    power: Power | None
    """What it would take to see one point."""

    @property
    def verdict(self) -> str:
        """`helps`, `hurts` or `no difference seen`: the interval and Holm's test must agree."""
        return self.difference.verdict if self.p_holm < 0.05 else "no difference seen"


@dataclass(frozen=True)
class Convergence:
    """How soon an arm's trials reach the reference's final validation loss."""

    task: str
    arm: str
    against: str
    n: int
    n_steps: float
    """Steps of the reference's whole run."""
    steps: float | None
    """Steps of the arm; None: it does not get there."""
    curves: dict[str, list[tuple[float, float]]]
    """Arm and reference -> (step, validation loss), mean of the trials at the chosen rate."""


@dataclass(frozen=True)
class Efficiency:
    """How many rows the reference needs to score what an arm scores with n."""

    task: str
    arm: str
    against: str
    n: int
    equals: float | None
    """Rows of the reference; None: more than the largest size tried."""


@dataclass(frozen=True)
class ArmCost:
    """What an arm cost at one n, training alone, mean over tasks and seeds."""

    arm: str
    n: int
    flops_per_task: float
    training_s_per_task: float
    n_tokens_per_task: float
    n_trainable_parameters: int
    peak_memory_bytes: int
    warm_up_flops: float
    """Paid once for all tasks."""
    n_tasks: int
    """Tasks of the study that share it."""
    flops_saved_per_task: float | None
    """By stopping where the reference's final validation loss is reached; None: not measured."""

    @property
    def amortised_flops(self) -> float:
        """Operations of one task with its share of the warm-up."""
        return self.flops_per_task + self.warm_up_flops / self.n_tasks

    @property
    def break_even_tasks(self) -> float:
        """Tasks after which the warm-up has paid for itself in operations; may be infinite."""
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
    convergence: list[Convergence]
    efficiency: list[Efficiency]
    costs: list[ArmCost]
    score_of: dict[str, str]
    """Task -> name of its main score's column."""
    trials: list[dict[str, Any]]
    rates: list[dict[str, Any]]
    warm_ups: dict[str, Any]
    failures: dict[str, str]
    contamination: list[dict[str, Any]]
    """Of each warm-up and task: training rows checked and taken out, as `Check.to_json`."""
    provenance: dict[str, Any]
    store: Path
    cells: list[dict[str, Any]]
    """Finished cells as in results.jsonl; `key` names the folder of one in the store."""

    def level(self, task: str, arm: str, n: int) -> Level | None:
        """Return one level, or None where no cell of it is finished."""
        found = (v for v in self.levels if (v.task, v.arm, v.n) == (task, arm, n))
        return next(found, None)

    def title(self, task: str) -> str:
        """Return a task's name for people."""
        return self.plan.tasks[task].title or task

    def score_name(self, task: str) -> str:
        """Return the main score's name for people."""
        return MAIN_SCORES.get(self.score_of[task], self.score_of[task])

    def not_compared(self) -> list[tuple[str, str, str, int]]:
        """Return (task, arm, reference, n) where both were measured, but with unequal seeds."""
        compared = {(c.task, c.arm, c.n) for c in self.comparisons}
        return [
            (v.task, v.arm, other, v.n)
            for v in self.levels
            if (other := _references(self.plan).get(v.arm)) is not None
            and (v.task, v.arm, v.n) not in compared
            and self.level(v.task, other, v.n) is not None
        ]

    def verdicts(self) -> list[str]:
        """Return what was found in words, one sentence a comparison."""
        return [self._said(c) for c in self.comparisons]

    def _said(self, c: Comparison) -> str:
        d = c.difference
        low, mean, high = (100 * value for value in (d.low, d.mean, d.high))
        points = f"{mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"
        place = f"{self.title(c.task)}, n = {c.n}"
        if c.verdict == "no difference seen":
            return f"{place}: no difference seen between {c.arm} and {c.against} ({points})"
        seeds = "" if d.n_agree == d.n_seeds else f", in {d.n_agree} of {d.n_seeds} seeds"
        return f"{place}: {c.arm} {c.verdict} against {c.against} ({points}{seeds})"


def read_findings(path: Path) -> Findings:
    """Read a study's folder and work out what it found.

    Raises:
        RunError: If it is no study, or no cell of it is finished.
    """
    if not (path / "study.json").is_file():
        raise RunError(f"{path}: no study: it has no study.json; run d2lora study first")
    study = read_json(path / "study.json")
    plan = StudyPlan(**study["plan"])
    rows = _lines(path / "results.jsonl")
    if not rows:
        raise RunError(f"{path}: no cell of the study is finished")
    trials = _lines(path / "trials.jsonl")
    score_of = {task: _main_score(rows, task) for task in plan.tasks}
    levels = _levels(rows, plan, score_of)
    against = _references(plan)
    comparisons = _comparisons(levels, against)
    convergence = _convergence(trials, study["rates"], against)
    return Findings(
        path=path,
        plan=plan,
        levels=levels,
        comparisons=comparisons,
        convergence=convergence,
        efficiency=_efficiency(levels, against),
        costs=_costs(levels, plan, study["warm_ups"], convergence),
        score_of=score_of,
        trials=trials,
        rates=study["rates"],
        warm_ups=study["warm_ups"],
        failures=study["failures"],
        contamination=study.get("contamination", []),
        provenance=study["provenance"],
        store=Path(study["store"]),
        cells=rows,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _main_score(rows: Sequence[dict[str, Any]], task: str) -> str:
    columns = next((row["scores"] for row in rows if row["task"] == task), {})
    return next((name for name in MAIN_SCORES if name in columns), next(iter(columns), ""))


def _references(plan: StudyPlan) -> dict[str, str]:
    """Return what each arm is compared with."""
    first = plan.arms[0].name
    wanted = {arm.name: arm.against or first for arm in plan.arms}
    return {arm: other for arm, other in wanted.items() if arm != other}


def _levels(
    rows: Sequence[dict[str, Any]], plan: StudyPlan, score_of: dict[str, str]
) -> list[Level]:
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["arm"], row["n"]), []).append(row)
    bases = {task: groups.get((task, BASE, 0), [{}])[0] for task in plan.tasks}
    levels: list[Level] = []
    for (task, arm, n), group in groups.items():
        group.sort(key=lambda row: row["seed"])
        scores = np.array([row["scores"][score_of[task]] for row in group], dtype=float)
        levels.append(
            Level(
                task=task,
                arm=arm,
                kind=group[0]["kind"],
                n=n,
                scores=scores,
                interval=mean_interval(scores.mean(axis=0)),
                learning_rate=group[0]["learning_rate"],
                general_loss_change=_loss_change(group, bases[task]),
                choices_change=_choices_change(group, bases[task]),
                costs=tuple(row["cost"] for row in group if "cost" in row),
                folders=tuple(row["adapter"] for row in group),
            )
        )
    return levels


def _loss_change(group: Sequence[dict[str, Any]], base: dict[str, Any]) -> Array | None:
    reference = base.get("general_loss")
    if reference is None or any(row["general_loss"] is None for row in group):
        return None
    return np.array([row["general_loss"] - reference for row in group])


def _choices_change(group: Sequence[dict[str, Any]], base: dict[str, Any]) -> Difference | None:
    right = base.get("choices_right")
    if right is None or any(row["choices_right"] is None for row in group):
        return None
    own = np.array([row["choices_right"] for row in group], dtype=float)
    return paired_difference(np.repeat(np.array([right], dtype=float), len(own), 0), own)


def _comparisons(levels: Sequence[Level], against: dict[str, str]) -> list[Comparison]:
    found = {(v.task, v.arm, v.n): v for v in levels}
    comparisons: list[Comparison] = []
    for task in dict.fromkeys(v.task for v in levels):
        for arm, other in against.items():
            pairs = [
                (v, found[task, other, v.n])
                for v in levels
                if (v.task, v.arm) == (task, arm) and (task, other, v.n) in found
            ]
            pairs = [(v, w) for v, w in pairs if v.scores.shape == w.scores.shape]
            p_values = [permutation_p(w.scores, v.scores) for v, w in pairs]
            for (v, w), p, adjusted in zip(pairs, p_values, holm(p_values), strict=True):
                difference = paired_difference(w.scores, v.scores)
                needed = power(w.scores, v.scores)
                comparisons.append(
                    Comparison(task, arm, other, v.n, difference, p, adjusted, needed)
                )
    return comparisons


def _convergence(
    trials: Sequence[dict[str, Any]], rates: Sequence[dict[str, Any]], against: dict[str, str]
) -> list[Convergence]:
    curves: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for rate in rates:
        place = (rate["task"], rate["arm"], rate["n"])
        own = [
            trial["curve"]
            for trial in trials
            if (trial["task"], trial["arm"], trial["n"]) == place
            and trial.get("learning_rate") == rate["learning_rate"]
        ]
        if own and len({len(curve) for curve in own}) == 1:
            curves[place] = [(float(s), float(v)) for s, v in np.mean(own, axis=0)]
    found: list[Convergence] = []
    for (task, arm, n), curve in curves.items():
        reference = curves.get((task, against.get(arm, ""), n))
        if reference is not None:
            steps = steps_to_reach(curve, reference[-1][1])
            both = {arm: curve, against[arm]: reference}
            found.append(Convergence(task, arm, against[arm], n, reference[-1][0], steps, both))
    return found


def _efficiency(levels: Sequence[Level], against: dict[str, str]) -> list[Efficiency]:
    found: list[Efficiency] = []
    for level in levels:
        other = against.get(level.arm)
        curve = sorted(
            (v.n, v.interval.mean) for v in levels if (v.task, v.arm) == (level.task, other)
        )
        if other is None or level.n == 0 or not curve:
            continue
        sizes, scores = zip(*curve, strict=True)
        equals = size_that_scores(sizes, scores, level.interval.mean)
        found.append(Efficiency(level.task, level.arm, other, level.n, equals))
    return found


def _costs(
    levels: Sequence[Level], plan: StudyPlan, warm_ups: dict[str, Any],
    convergence: Sequence[Convergence],
) -> list[ArmCost]:  # fmt: skip
    found: list[ArmCost] = []
    for arm in plan.arms:
        shared = arm.kind in NEEDS_WARM_UP - {"longer", "mixed"} and arm.warm_up in warm_ups
        warm_up_flops = warm_ups[arm.warm_up or ""]["cost"]["flops"] if shared else 0.0
        for n in plan.sizes:
            own = [v for v in levels if (v.arm, v.n) == (arm.name, n)]
            costs = [cost for v in own for cost in v.costs]
            if not costs:
                continue
            flops = float(np.mean([cost["flops"] for cost in costs]))
            reached = [c for c in convergence if (c.arm, c.n) == (arm.name, n)]
            found.append(
                ArmCost(
                    arm=arm.name,
                    n=n,
                    flops_per_task=flops,
                    training_s_per_task=float(np.mean([cost["elapsed_s"] for cost in costs])),
                    n_tokens_per_task=float(np.mean([cost["n_tokens"] for cost in costs])),
                    n_trainable_parameters=costs[0]["n_trainable_parameters"],
                    peak_memory_bytes=max(cost["peak_memory_bytes"] for cost in costs),
                    warm_up_flops=warm_up_flops,
                    n_tasks=len(plan.tasks),
                    flops_saved_per_task=_saved(reached, flops),
                )
            )
    return found


def _saved(reached: Sequence[Convergence], flops: float) -> float | None:
    """Return the mean saving of an arm that stops where its reference ends up.

    An arm that does not get there saves nothing on that task; None where nothing was measured.
    """
    if not reached:
        return None
    shares = [0.0 if c.steps is None else 1 - c.steps / c.n_steps for c in reached]
    return flops * float(np.mean(shares))
