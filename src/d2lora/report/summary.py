"""Findings as tables and sentences for the terminal."""

import math

from rich.console import Console

from d2lora.errors import counted
from d2lora.report.examples import read_examples
from d2lora.report.findings import (
    ArmCost,
    Comparison,
    Findings,
    Level,
)
from d2lora.report.numbers import CI, NOT_KNOWN, p_text, range_text, signed, tflop
from d2lora.runtime.grids import NONE, Grid, as_table
from d2lora.study.decontamination import contamination_lines


def task_grid(findings: Findings, task: str) -> Grid:
    """Return a task's scores, differences and forgetting, one row an arm and size."""
    title = f"{findings.title(task)}: {findings.score_name(task)}, %, mean over seeds"
    columns = (
        "n",
        "arm",
        "score",
        "difference",
        CI,
        "CI over rows alone",
        "p, Holm",
        "held-out general loss",
        "MC accuracy",
    )
    rows = [
        _row(level, _comparison(findings, level))
        for level in sorted(_levels(findings, task), key=lambda v: v.n)
    ]
    return Grid(title, columns, rows)


def pooled_grid(findings: Findings) -> Grid:
    """Return the mean difference of each pair of arms over all tasks and sizes."""
    columns = ("arm", "against", "mean of", "difference", CI, "p", "verdict")
    rows = [
        (
            c.arm,
            c.against,
            c.place,
            signed(100 * c.pooled.mean),
            NONE if c.pooled.interval is None else range_text(*c.pooled.interval),
            NONE if c.pooled.p_value is None else p_text(c.pooled.p_value),
            c.verdict,
        )
        for c in findings.pooled
    ]
    return Grid("Pooled effect over tasks and sizes, points", columns, rows)


def cost_grid(findings: Findings) -> Grid:
    """Return each arm's training cost, with its share of the warm-up and the break-even."""
    columns = (
        "n",
        "arm",
        "TFLOP per task",
        "with the warm-up's share",
        "seconds",
        "tokens",
        "trainable parameters",
        "peak memory, MB",
        "warm-up pays off after",
    )
    rows = [
        (
            str(c.n),
            c.arm,
            tflop(c.flops_per_task),
            tflop(c.amortised_flops),
            f"{c.training_s_per_task:.1f}",
            f"{c.n_tokens_per_task:,.0f}",
            f"{c.n_trainable_parameters:,}",
            f"{c.peak_memory_bytes / 1e6:,.0f}",
            _pays_off(c),
        )
        for c in sorted(findings.costs, key=lambda c: c.n)
    ]
    return Grid("Cost of training, mean over tasks and seeds (peak memory: maximum)", columns, rows)


def show(findings: Findings, console: Console) -> None:
    """Print the verdicts and tables of a study."""
    grids = [task_grid(findings, task) for task in findings.plan.tasks]
    for grid in (*grids, pooled_grid(findings), cost_grid(findings)):
        if grid.rows:
            console.print(as_table(grid))
    console.print(
        "held-out general loss: change against the base, nats per token; MC accuracy: change of "
        "multiple-choice accuracy against the base, points.",
        highlight=False,
    )
    for name, warm_up in findings.warm_ups.items():
        cost = warm_up["cost"]
        console.print(
            f"Warm-up `{name}`: {cost['elapsed_s']:.0f} s and {cost['n_tokens']:,} tokens, once "
            "for all tasks.",
            highlight=False,
        )
    for line in contamination_lines(findings.contamination):
        console.print(f"Contamination: {line}.", highlight=False, markup=False)
    console.print("Findings:", style="bold")
    for verdict in findings.verdicts():
        console.print(f"  {verdict}", highlight=False)
    for cell, reason in findings.failures.items():
        console.print(f"  failed: {cell}: {reason}", style="red", highlight=False, markup=False)


def show_answers(findings: Findings, n_rows: int, console: Console) -> None:
    """Print the answers to the first test rows: the true ones, the base's, each arm's.

    Of an arm they are those of the largest n and the first seed.
    """
    data = read_examples(findings).data
    texts, most = data["texts"], max(findings.plan.sizes)
    for task in data["tasks"].values():
        cells = [cell for cell in task["cells"] if cell["n"] in (0, most) and cell["seed"] == 0]
        shown = counted(min(n_rows, len(task["targets"])), "test row")
        console.print(f"{task['title']}: the first {shown}, n = {most}", style="bold")
        for row, target in enumerate(task["targets"][:n_rows]):
            answers = [("true", target), *((cell["arm"], cell["outputs"][row]) for cell in cells)]
            for name, text in answers:
                line = f"  {name:6} {' '.join(texts[text].split())}"
                console.print(
                    line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis"
                )
            console.print()


def _levels(findings: Findings, task: str) -> list[Level]:
    return [level for level in findings.levels if level.task == task]


def _comparison(findings: Findings, level: Level) -> Comparison | None:
    place = (level.task, level.arm, level.n)
    return next((c for c in findings.comparisons if (c.task, c.arm, c.n) == place), None)


def _row(level: Level, comparison: Comparison | None) -> tuple[str, ...]:
    difference = wide = rows = p = ""
    if comparison is not None:
        d = comparison.difference
        difference = signed(100 * d.mean)
        wide = NONE if d.over_seeds is None else range_text(*d.over_seeds)
        rows, p = range_text(d.low, d.high), f"{comparison.p_holm:.4f}"
    loss, choices = level.general_loss_change, level.mc_accuracy_change
    return (
        str(level.n) if level.n else "-",
        level.arm,
        f"{100 * level.interval.mean:.1f}",
        difference,
        wide,
        rows,
        p,
        "" if loss is None or level.arm == "base" else f"{loss.mean():+.2f}",
        "" if choices is None or level.arm == "base" else f"{100 * choices.mean:+.1f}",
    )


def _pays_off(cost: ArmCost) -> str:
    """Return the number of tasks after which the warm-up pays off."""
    if not cost.warm_up_flops:
        return NONE
    if cost.flops_saved_per_task is None:
        return "not measured"
    tasks = cost.break_even_tasks
    if math.isnan(tasks):
        return NOT_KNOWN
    return "never" if tasks == math.inf else f"{math.ceil(tasks):,} tasks"
