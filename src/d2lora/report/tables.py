"""The tables of a report, as text."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from d2lora.errors import counted
from d2lora.report.findings import Comparison, Findings, Level, flops_of
from d2lora.report.numbers import CI, range_text, signed, tflop
from d2lora.runtime.grids import NONE, Grid
from d2lora.runtime.run_folder import sha256_of
from d2lora.study.cells import BASE
from d2lora.study.plan import StudyPlan


def score_table(findings: Findings, task: str) -> Grid:
    """Return a task's scores with their intervals and differences, one row per arm and size."""
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
        "95 % CI",
        "SD of seeds",
        "difference",
        CI,
        "CI over rows alone",
        "p, Holm",
        "verdict",
        "held-out general loss",
        "MC accuracy",
    )
    return Grid(f"{findings.title(task)}: scores", columns, rows)


def chart_score_grid(findings: Findings, levels: Sequence[Level], title: str) -> Grid:
    """Return what a chart of scores shows, one row per arm and size."""
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
    return Grid(title, ("n", "arm", score, "95 % CI", "each seed"), rows)


def difference_grid(comparisons: Iterable[Comparison], title: str) -> Grid:
    """Return what a chart of differences shows, one row per arm and size."""
    rows = [
        (
            f"{c.n:,}",
            c.arm,
            c.against,
            signed(100 * c.difference.mean),
            NONE if c.difference.over_seeds is None else range_text(*c.difference.over_seeds),
            range_text(c.difference.low, c.difference.high),
            ", ".join(signed(100 * d) for d in c.difference.by_seed),
            c.verdict,
        )
        for c in sorted(comparisons, key=lambda c: c.n)
    ]
    intervals = (CI, "CI over rows alone")
    columns = ("n", "arm", "against", "difference", *intervals, "each seed", "verdict")
    return Grid(title, columns, rows)


def efficiency_table(findings: Findings) -> Grid:
    """Return how many rows the reference needs to match an arm, and the ratio of steps."""
    steps = {(c.task, c.arm, c.n): c for c in findings.convergence}
    largest = max(findings.plan.sizes)
    rows: list[tuple[str, ...]] = []
    for e in sorted(findings.efficiency, key=lambda e: (e.task, e.n)):
        equals = f"more than {largest:,}" if e.equals is None else f"{e.equals:,.0f}"
        c = steps.get((e.task, e.arm, e.n))
        reached = NONE
        if c is not None:
            reached = f"{c.n_reached} of {counted(len(c.seeds), 'seed')} reach it"
            reached = reached if c.ratio is None else f"{c.ratio:.2f}"
        rows.append((str(e.n), findings.title(e.task), e.arm, e.against, equals, reached))
    columns = (
        "n",
        "task",
        "arm",
        "against",
        "rows for the same score",
        "ratio of steps",
    )
    return Grid("Data efficiency and convergence", columns, rows)


def tuning_table(findings: Findings) -> Grid:
    """Return the learning rate and length of every arm, task and n, and how they were tuned."""
    columns = (
        "n", "task", "arm", "learning rate", "steps", "lowest validation loss by learning rate",
        "at the edge of the search",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for level in sorted(findings.levels, key=lambda v: (v.task, v.n)):
        if not level.learning_rates:
            continue
        own = [c for c in findings.chosen if _place(c) == (level.task, level.arm, level.n)]
        tried = [t for t in findings.trials if _place(t) == (level.task, level.arm, level.n)]
        rows.append(
            (
                str(level.n),
                findings.title(level.task),
                level.arm,
                _counted(level.learning_rates),
                _counted([cost["n_steps"] for cost in level.costs]),
                _tried(tried) or "set by the plan",
                _ends(own),
            )
        )
    return Grid("Learning rates and lengths (number of seeds)", columns, rows)


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
                tflop(flops_of(cost)),
                _loss(warm_up.get("validation_loss_before")),
                _loss(warm_up.get("validation_loss_after")),
            )
        )
    return Grid("Warm-ups, once for all tasks; held-out loss in nats per token", columns, rows)


def contamination_table(findings: Findings) -> Grid:
    """Return how many training rows were compared with the evaluation files and removed."""
    rows = [
        (
            check["use"],
            NONE if check["n_rows"] is None else f"{check['n_rows']:,}",
            f"{check['n_removed']:,}",
            check["first"] or NONE,
        )
        for check in findings.contamination
    ]
    columns = ("rows of", "checked", "removed", "first of them")
    return Grid("Contamination: training rows that overlap with an evaluation row", columns, rows)


def version_table(provenance: dict[str, Any]) -> Grid:
    """Return versions, commit, platform and date."""
    plain = {k: v for k, v in provenance.items() if k != "versions" and v is not None}
    rows = [(k, str(v)) for k, v in {**plain, **provenance.get("versions", {})}.items()]
    return Grid("Software and machine of the last run", ("what", "version"), rows)


def _there(name: str) -> Path | None:
    """Return a file that is there; of a name that no file can have, a system's error is none."""
    with suppress(OSError):
        return Path(name) if Path(name).is_file() else None
    return None


def fingerprint_table(plan: StudyPlan) -> Grid:
    """Return the SHA-256 of every data file that still exists."""
    rows: list[tuple[str, ...]] = []
    for use, name in dict.fromkeys(_data(plan)):
        path = _there(name)
        fingerprint = "no such file here" if path is None else sha256_of(path)
        rows.append((use, name if path is None else path.name, fingerprint))
    return Grid("Data files, as they are now", ("use", "file", "SHA-256"), rows)


def failure_table(findings: Findings) -> Grid:
    """Return the cells that failed and why."""
    return Grid("Failed cells", ("cell", "reason"), list(findings.failures.items()))


def percent(value: float) -> str:
    """Return a share as a percentage, without the % sign."""
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
    verdict, seeds = c.verdict, c.seeds
    return (
        signed(100 * d.mean),
        NONE if d.over_seeds is None else range_text(*d.over_seeds),
        range_text(d.low, d.high),
        f"{c.p_holm:.4f}",
        f"{verdict} ({seeds})" if seeds else verdict,
    )


def _forgetting(level: Level) -> tuple[str, str]:
    loss, choices = level.general_loss_change, level.mc_accuracy_change
    if level.arm == BASE:
        return (NONE, NONE)
    return (
        NONE if loss is None else signed(float(loss.mean()), 2),
        NONE if choices is None else signed(100 * choices.mean),
    )


def _place(trial: dict[str, Any]) -> tuple[str, str, int]:
    return trial["task"], trial["arm"], trial["n"]


def _counted(values: Sequence[float]) -> str:
    """Return values with how many seeds have each: `0.003 (4), 0.01 (1)`."""
    return ", ".join(f"{value:g} ({n})" for value, n in sorted(Counter(values).items()))


def _ends(chosen: Sequence[dict[str, Any]]) -> str:
    """Return how many seeds took a learning rate, or a length, at the edge of the search."""
    if not chosen:
        return NONE
    ends = (("at_edge", "learning rate"), ("at_end", "steps"))
    found = [(word, sum(one[name] for one in chosen)) for name, word in ends]
    return ", ".join(f"{word} ({n})" for word, n in found if n) or "no"


def _tried(trials: Iterable[dict[str, Any]]) -> str:
    """Return the mean over seeds and folds of the lowest loss of each learning rate."""
    losses: dict[float, list[float]] = {}
    for trial in trials:
        if trial.get("curve"):
            lowest = min(loss for _, loss in trial["curve"])
            losses.setdefault(trial["learning_rate"], []).append(lowest)
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
        ready = plan.ready(name)
        if ready is not None:
            data = str(ready / "adapter_model.safetensors")
        paths = (data,) if isinstance(data, str) else data
        yield from ((f"warm-up {name}", path) for path in paths)
    yield from (("general text", path) for path in plan.general_text)
    yield from (("multiple choice", path) for path in plan.choices)
