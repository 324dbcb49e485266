"""The tables of a report, as text."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from d2lora.findings import BASE, Comparison, Findings, Level, range_said, signed
from d2lora.grids import NONE, Grid
from d2lora.plan import StudyPlan
from d2lora.runs import sha256_of


def score_table(findings: Findings, task: str) -> Grid:
    """Return a task's scores with their intervals and differences, one row an arm and size."""
    compared = {(c.arm, c.n): c for c in findings.comparisons if c.task == task}
    rows = [
        (
            _size(level.n),
            level.arm,
            percent(level.interval.mean),
            f"{percent(level.interval.low)} to {percent(level.interval.high)}",
            _spread(level.by_seed),
            *_difference(compared.get((level.arm, level.n))),
            *_forgetting(level),
        )
        for level in sorted((v for v in findings.levels if v.task == task), key=lambda v: v.n)
    ]
    columns = (
        "n",
        "arm",
        f"{findings.score_name(task)}, %",
        "95 % interval",
        "SD of seeds",
        "difference",
        "95 % interval",
        "over seeds too",
        "p, Holm",
        "verdict",
        "general loss",
        "choices",
    )
    return Grid(f"{findings.title(task)}: scores", columns, rows)


def score_grid(findings: Findings, levels: Sequence[Level], title: str) -> Grid:
    """Return what a chart of scores shows, one row an arm and size."""
    rows = [
        (
            f"{v.n:,}" if v.n else NONE,
            v.arm,
            percent(v.interval.mean),
            f"{percent(v.interval.low)} to {percent(v.interval.high)}",
            ", ".join(percent(s) for s in v.by_seed),
        )
        for v in sorted(levels, key=lambda v: v.n)
    ]
    score = f"{findings.score_name(levels[0].task)}, %"
    return Grid(title, ("n", "arm", score, "95 % interval", "each seed"), rows)


def difference_grid(comparisons: Iterable[Comparison], title: str) -> Grid:
    """Return what a chart of differences shows, one row an arm and size."""
    rows = [
        (
            f"{c.n:,}",
            c.arm,
            c.against,
            signed(100 * c.difference.mean),
            range_said(c.difference.low, c.difference.high),
            NONE if c.difference.over_seeds is None else range_said(*c.difference.over_seeds),
            ", ".join(signed(100 * d) for d in c.difference.by_seed),
            c.verdict,
        )
        for c in sorted(comparisons, key=lambda c: c.n)
    ]
    intervals = ("95 % interval", "over seeds too")
    columns = ("n", "arm", "against", "difference", *intervals, "each seed", "verdict")
    return Grid(title, columns, rows)


def efficiency_table(findings: Findings) -> Grid:
    """Return how many rows, and how many steps, the reference needs to match an arm."""
    steps = {(c.task, c.arm, c.n): c for c in findings.convergence}
    largest = max(findings.plan.sizes)
    rows: list[tuple[str, ...]] = []
    for e in sorted(findings.efficiency, key=lambda e: (e.task, e.n)):
        equals = f"more than {largest:,}" if e.equals is None else f"{e.equals:,.0f}"
        c = steps.get((e.task, e.arm, e.n))
        reached = NONE
        if c is not None:
            reached = "not reached" if c.steps is None else f"{c.steps:.0f} of {c.n_steps:.0f}"
        rows.append((str(e.n), findings.title(e.task), e.arm, e.against, equals, reached))
    columns = ("n", "task", "arm", "against", "rows for the same score", "steps to the same loss")
    return Grid("Data efficiency and convergence", columns, rows)


def rate_table(findings: Findings) -> Grid:
    """Return the learning rate of every arm, task and n, and how it was chosen."""
    chosen = {(r["task"], r["arm"], r["n"]): r for r in findings.rates}
    columns = ("n", "task", "arm", "learning rate", "chosen from", "edge of the grid")
    rows: list[tuple[str, ...]] = []
    for level in sorted(findings.levels, key=lambda v: (v.task, v.n)):
        if level.learning_rate is None:
            continue
        rate = chosen.get((level.task, level.arm, level.n))
        tried = [t for t in findings.trials if _place(t) == (level.task, level.arm, level.n)]
        edge = (
            NONE
            if rate is None
            else ("yes: a rate beyond may be better" if rate["at_edge"] else "no")
        )
        rows.append(
            (
                str(level.n),
                findings.title(level.task),
                level.arm,
                f"{level.learning_rate:g}",
                _tried(tried) or "given by the plan",
                edge,
            )
        )
    return Grid("Learning rates", columns, rows)


def warm_up_table(findings: Findings) -> Grid:
    """Return the warm-ups: cost, and held-out loss before and after."""
    columns = (
        "warm-up",
        "seconds",
        "tokens",
        "steps",
        "TFLOP",
        "loss before",
        "loss after",
    )
    rows: list[tuple[str, ...]] = []
    for name, warm_up in findings.warm_ups.items():
        cost = warm_up["cost"]
        rows.append(
            (
                name,
                f"{cost['elapsed_s']:.1f}",
                f"{cost['n_tokens']:,}",
                f"{cost['n_steps']:,}",
                f"{cost['flops'] / 1e12:.3g}",
                _loss(warm_up.get("validation_loss_before")),
                _loss(warm_up.get("validation_loss_after")),
            )
        )
    return Grid("Warm-ups, once for all tasks; loss on held-out general rows", columns, rows)


def contamination_table(findings: Findings) -> Grid:
    """Return how many training rows were compared with the evaluation files and taken out."""
    rows = [
        (
            check["use"],
            NONE if check["n_rows"] is None else f"{check['n_rows']:,}",
            f"{check['n_removed']:,}",
            check["first"] or NONE,
        )
        for check in findings.contamination
    ]
    columns = ("rows of", "checked", "taken out", "the first of them")
    return Grid("Training rows that give an evaluation row away", columns, rows)


def version_table(provenance: dict[str, Any]) -> Grid:
    """Return versions, commit, platform and date."""
    plain = {k: v for k, v in provenance.items() if k != "versions" and v is not None}
    rows = [(k, str(v)) for k, v in {**plain, **provenance.get("versions", {})}.items()]
    return Grid("Software and machine of the last run", ("what", "version"), rows)


def fingerprint_table(plan: StudyPlan) -> Grid:
    """Return the SHA-256 of every data file that is still there."""
    rows: list[tuple[str, ...]] = []
    for use, name in dict.fromkeys(_data(plan)):
        path = Path(name)
        fingerprint = sha256_of(path) if path.is_file() else "not a file here"
        rows.append((use, path.name if path.is_file() else name, fingerprint))
    return Grid("Data files, as they are now", ("use", "file", "SHA-256"), rows)


def failure_table(findings: Findings) -> Grid:
    """Return the cells that failed and why."""
    return Grid("Failed cells", ("cell", "reason"), list(findings.failures.items()))


def percent(value: float) -> str:
    """Return a share as a percentage without its sign."""
    return f"{100 * value:.1f}"


def _size(n: int) -> str:
    return f"{n:,}" if n else NONE


def _spread(by_seed: Sequence[float]) -> str:
    if len(by_seed) < 2:
        return NONE
    mean = sum(by_seed) / len(by_seed)
    return percent(math.sqrt(sum((v - mean) ** 2 for v in by_seed) / (len(by_seed) - 1)))


def _difference(c: Comparison | None) -> tuple[str, ...]:
    if c is None:
        return (NONE,) * 5
    d = c.difference
    verdict, said = c.verdict, c.seeds
    return (
        signed(100 * d.mean),
        range_said(d.low, d.high),
        NONE if d.over_seeds is None else range_said(*d.over_seeds),
        f"{c.p_holm:.4f}",
        f"{verdict} ({said})" if said else verdict,
    )


def _forgetting(level: Level) -> tuple[str, str]:
    loss, choices = level.general_loss_change, level.choices_change
    if level.arm == BASE:
        return (NONE, NONE)
    return (
        NONE if loss is None else signed(float(loss.mean()), 2),
        NONE if choices is None else signed(100 * choices.mean),
    )


def _place(trial: dict[str, Any]) -> tuple[str, str, int]:
    return trial["task"], trial["arm"], trial["n"]


def _tried(trials: Iterable[dict[str, Any]]) -> str:
    losses: dict[float, list[float]] = {}
    for trial in trials:
        if trial.get("validation_loss_after") is not None:
            losses.setdefault(trial["learning_rate"], []).append(trial["validation_loss_after"])
    return "; ".join(
        f"{rate:g}: {sum(values) / len(values):.3f}" for rate, values in sorted(losses.items())
    )


def _loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _data(plan: StudyPlan) -> Iterable[tuple[str, str]]:
    for name, task in plan.tasks.items():
        yield from ((f"{task.title or name}: training", path) for path in task.data)
        yield from ((f"{task.title or name}: test", path) for path in task.test)
    for name, own in plan.warm_ups.items():
        data = {**plan.warm_up, **own}.get("data", ())
        paths = (data,) if isinstance(data, str) else data
        yield from ((f"warm-up {name}", path) for path in paths)
    yield from (("general text", path) for path in plan.general_text)
    yield from (("multiple choice", path) for path in plan.choices)
