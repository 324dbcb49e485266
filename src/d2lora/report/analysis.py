"""Findings of a study: a pure function of its folder's files.

study folder ─▶ levels (arm x task x n) ─▶ comparisons, convergence, data efficiency, cost
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from d2lora.errors import RunError, printable
from d2lora.evaluation.crossed import pooled_difference, power, within_0_and_1
from d2lora.evaluation.metrics import main_column
from d2lora.evaluation.stats import Difference, difference_p, holm, mean_interval, paired_difference
from d2lora.report.curves import mean_of, size_that_scores, steps_to_reach
from d2lora.report.findings import (
    ArmCost,
    Array,
    Comparison,
    Convergence,
    Efficiency,
    Findings,
    Level,
    PooledComparison,
    Reached,
    flops_of,
    references,
)
from d2lora.runtime.run_folder import read_json
from d2lora.study.cells import BASE
from d2lora.study.plan import NEEDS_WARM_UP, StudyPlan

Curve = list[tuple[float, float]]
_KEYS = {"plan", "chosen", "warm_ups", "failures", "provenance", "store"}
_AGAIN = "run d2lora study again, which makes it anew from what is finished"


def read_findings(path: Path) -> Findings:
    """Read a study's folder and compute its findings.

    Raises:
        RunError: If it is not a study, or no cell of it is finished.
    """
    if not (path / "study.json").is_file():
        raise RunError(f"{path}: not a study: it has no study.json; run d2lora study first")
    study = read_json(path / "study.json")
    if lacking := sorted(_KEYS - study.keys()):
        raise RunError(f"{path / 'study.json'}: it lacks {', '.join(lacking)}; {_AGAIN}")
    study = {**_printable(study), "store": study["store"]}
    plan = StudyPlan.unchecked(study["plan"])
    rows = _lines(path / "results.jsonl")
    if not rows:
        raise RunError(f"{path}: no cell of the study is finished")
    n_unfinished = int(study.get("n_cells", 0)) - len(rows) - len(study["failures"])
    if n_unfinished > 0:
        rows = _shared_seeds(rows)
    if not rows:
        raise RunError(f"{path}: no seed is finished by every arm yet; look again later")
    trials = _lines(path / "trials.jsonl")
    score_of = {task: _main_score(rows, task) for task in plan.tasks}
    levels = _levels(rows, plan, score_of)
    against = references(plan)
    comparisons, pooled = _adjusted(_comparisons(levels, against), _pooled(levels, against))
    convergence = _convergence(study["chosen"], against)
    return Findings(
        path=path,
        plan=plan,
        levels=levels,
        comparisons=comparisons,
        pooled=pooled,
        convergence=convergence,
        efficiency=_efficiency(levels, against),
        costs=_costs(levels, plan, study["warm_ups"], convergence),
        score_of=score_of,
        trials=trials,
        chosen=study["chosen"],
        warm_ups=study["warm_ups"],
        failures=study["failures"],
        contamination=study.get("contamination", []),
        provenance=study["provenance"],
        store=Path(study["store"]),
        n_unfinished=max(0, n_unfinished),
        cells=rows,
    )


def _shared_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells of seeds that every arm begun at their task and n has finished."""
    seeds: dict[tuple[str, int], dict[str, set[int]]] = {}
    for row in rows:
        seeds.setdefault((row["task"], row["n"]), {}).setdefault(row["arm"], set()).add(row["seed"])
    shared = {place: set.intersection(*own.values()) for place, own in seeds.items()}
    return [row for row in rows if row["seed"] in shared[row["task"], row["n"]]]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            return [_printable(json.loads(line)) for line in file]
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: missing or cut off ({error}); {_AGAIN}") from None


def _printable(value: Any) -> Any:
    """Return a value with its texts and names as they can stand in pages, charts and tables."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(name): _printable(inner) for name, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list) else value


def _main_score(rows: Sequence[dict[str, Any]], task: str) -> str:
    scores = next((row["scores"] for row in rows if row["task"] == task), {})
    return main_column(scores)


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
                seeds=tuple(row["seed"] for row in group),
                scores=scores,
                interval=mean_interval(scores.mean(axis=0)),
                learning_rates=tuple(
                    row["learning_rate"] for row in group if row["learning_rate"] is not None
                ),
                general_loss_change=_loss_change(group, bases[task]),
                mc_accuracy_change=_mc_accuracy_change(group, bases[task]),
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


def _mc_accuracy_change(group: Sequence[dict[str, Any]], base: dict[str, Any]) -> Difference | None:
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
            pairs = [(v, w) for v, w in pairs if _are_paired(v, w)]
            for v, w in pairs:
                p, difference = (
                    difference_p(w.scores, v.scores),
                    paired_difference(w.scores, v.scores),
                )
                needed = power(w.scores, v.scores)
                comparisons.append(Comparison(task, arm, other, v.n, difference, p, p, needed))
    return comparisons


def _adjusted(
    comparisons: Sequence[Comparison], pooled: Sequence[PooledComparison]
) -> tuple[list[Comparison], list[PooledComparison]]:
    """Adjust the p-values of all that a study tests, so that few studies say anything wrong."""
    p_values = [c.p_value for c in comparisons]
    p_values += [1.0 if c.pooled.p_value is None else c.pooled.p_value for c in pooled]
    adjusted = iter(holm(p_values))
    single = [replace(c, p_holm=p) for c, p in zip(comparisons, adjusted, strict=False)]
    return single, [replace(c, p_holm=p) for c, p in zip(pooled, adjusted, strict=True)]


def _are_paired(one: Level, other: Level) -> bool:
    """Say whether two arms have scores of the same seeds, which a failed cell may lack."""
    return one.seeds == other.seeds and one.scores.shape == other.scores.shape


def _pooled(levels: Sequence[Level], against: dict[str, str]) -> list[PooledComparison]:
    """Pool each pair of arms over the tasks and sizes at which both have the most seeds."""
    found: list[PooledComparison] = []
    levels_at = {(v.task, v.arm, v.n): v for v in levels}
    for arm, other in against.items():
        cells: dict[tuple[str, int], Array] = {}
        within: list[bool] = []
        seeds: dict[tuple[str, int], tuple[int, ...]] = {}
        for v in levels:
            reference = levels_at.get((v.task, other, v.n))
            if v.arm == arm and reference and _are_paired(v, reference):
                cells[v.task, v.n] = v.scores - reference.scores
                seeds[v.task, v.n] = v.seeds
                within += [within_0_and_1(v.scores), within_0_and_1(reference.scores)]
        most = max(seeds.values(), key=len, default=())
        cells = {place: cell for place, cell in cells.items() if seeds[place] == most}
        if len(cells) < 2:
            continue
        tasks = tuple(dict.fromkeys(task for task, _ in cells))
        tables = [np.stack([c for (task, _), c in cells.items() if task == own]) for own in tasks]
        sizes = tuple(sorted({n for _, n in cells}))
        pooled = pooled_difference(tables, from_0_to_1=all(within))
        found.append(PooledComparison(arm, other, tasks, sizes, pooled, 1.0))
    return found


def _convergence(chosen: Sequence[dict[str, Any]], against: dict[str, str]) -> list[Convergence]:
    curves: dict[tuple[str, str, int], dict[int, Curve]] = {}
    for one in chosen:
        place = (one["task"], one["arm"], one["n"])
        finite = [(float(s), v) for s, v in one["curve"] if v is not None and math.isfinite(v)]
        if finite:
            curves.setdefault(place, {})[one["seed"]] = finite
    found: list[Convergence] = []
    for (task, arm, n), own in curves.items():
        references = curves.get((task, against.get(arm, ""), n), {})
        seeds = sorted(own.keys() & references.keys())
        if not seeds:
            continue
        reached = tuple(_reached(seed, own[seed], references[seed]) for seed in seeds)
        both = {
            arm: mean_of([own[seed] for seed in seeds]),
            against[arm]: mean_of([references[seed] for seed in seeds]),
        }
        found.append(Convergence(task, arm, against[arm], n, reached, both))
    return found


def _reached(seed: int, curve: Curve, reference: Curve) -> Reached:
    """Compare two curves at the reference's lowest loss: when does each first reach it?"""
    lowest = min(loss for _, loss in reference)
    own = steps_to_reach(reference, lowest)
    assert own is not None, "a curve reaches its own lowest loss"
    return Reached(seed, own, steps_to_reach(curve, lowest), curve[-1][0])


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
        warm_up_flops = flops_of(warm_ups[arm.warm_up or ""]["cost"]) if shared else 0.0
        for n in plan.sizes:
            own = [v for v in levels if (v.arm, v.n) == (arm.name, n)]
            costs = [cost for v in own for cost in v.costs]
            if not costs:
                continue
            flops = float(np.mean([flops_of(cost) for cost in costs]))
            saved = _saved([c for c in convergence if (c.arm, c.n) == (arm.name, n)], levels)
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
                    flops_saved_per_task=saved,
                )
            )
    return found


def _saved(convergence: Sequence[Convergence], levels: Sequence[Level]) -> float | None:
    """Return the mean saving over tasks and seeds; None where nothing was measured.

    It is what the reference takes to its lowest validation loss, less what the arm takes to the
    same, and may be negative. An arm that does not reach it counts with its whole run, and with no
    fewer steps than the reference takes: a run that ends early has saved nothing.
    """
    levels_at = {(v.task, v.arm, v.n): v for v in levels}
    saved: list[float] = []
    for c in convergence:
        own, reference = (levels_at.get((c.task, arm, c.n)) for arm in (c.arm, c.against))
        if own is None or reference is None:
            continue
        for seed in c.seeds:
            never = max(seed.whole, seed.reference_steps)
            steps = never if seed.steps is None else seed.steps
            of_reference = seed.reference_steps * reference.flops_per_step
            saved.append(of_reference - steps * own.flops_per_step)
    return float(np.mean(saved)) if saved else None
