"""The charts of a report: one specification each, drawn as a PNG and, live, in the page."""

from typing import Any

import altair as alt

from d2lora.errors import counted
from d2lora.report.canvas import Chart, Palette, Rows, chart_of, dots, rows_of
from d2lora.report.compared import differences, scores
from d2lora.report.findings import Convergence, Findings
from d2lora.report.numbers import signed
from d2lora.runtime.grids import NONE, Grid
from d2lora.study.cells import BASE

SMALL_HEIGHT = 200
MANY_ARMS = 8
"""With more arms lines are unreadable, and arms stand in rows instead."""


def charts(findings: Findings, palette: Palette) -> dict[str, list[Chart]]:
    """Return the charts of every section; a section without numbers has none."""
    tasks = findings.plan.tasks
    each_n = [(task, n) for task in tasks for n in findings.plan.sizes]
    many = len(findings.plan.arms) > MANY_ARMS
    compared = each_n if many else [(task, None) for task in tasks]
    sections: dict[str, list[Chart | None]] = {
        "score": [scores(findings, palette, task, n) for task, n in compared],
        "difference": [differences(findings, palette, task, n) for task, n in compared],
        "curves": [curves(findings, palette, task, n) for task, n in each_n],
        "forgetting": [forgetting(findings, palette, task) for task in tasks],
    }
    return {name: [c for c in own if c is not None] for name, own in sections.items()}


def curves(findings: Findings, palette: Palette, task: str, n: int) -> Chart | None:
    """Draw the validation loss over steps of every arm, on rows held out of the n."""
    own = [c for c in findings.convergence if (c.task, c.n) == (task, n)]
    if not own:
        return None
    lines = {arm: curve for c in own for arm, curve in c.curves.items()}
    shown = palette.ordered(list(lines))
    rows = [{"arm": arm, "step": step, "loss": loss} for arm in shown for step, loss in lines[arm]]
    x = alt.X("step:Q", title="optimizer step")
    y = alt.Y("loss:Q", title="validation loss", scale=alt.Scale(zero=False))
    tooltip = ["arm:N", "step:Q", alt.Tooltip("loss:Q", format=".3f")]
    base = rows_of(rows).encode(x=x, y=y, color=palette.colour(shown), tooltip=tooltip)
    ends = [{"loss": min(loss for _, loss in lines[c.against])} for c in own[:1]]
    layers = [
        rows_of(ends).mark_rule(strokeDash=[4, 4]).encode(y=y),
        base.mark_line(strokeWidth=2),
        base.mark_point(filled=True, size=36, opacity=1).encode(shape=palette.shape(shown)),
    ]
    title = f"{findings.title(task)}, n = {n:,}"
    words = "Validation loss over optimizer steps. " + " ".join(_reached(c) for c in own)
    grid = Grid(
        f"{title}: validation loss",
        ("step", "arm", "validation loss"),
        [(f"{step:.0f}", arm, f"{loss:.3f}") for arm in shown for step, loss in lines[arm]],
    )
    return chart_of(f"curves-{task}-{n}", title, words, layers, grid, SMALL_HEIGHT)


def forgetting(findings: Findings, palette: Palette, task: str) -> Chart | None:
    """Draw score against forgetting, a point per arm and n."""
    own = [v for v in findings.levels if v.task == task and v.general_loss_change is not None]
    if not any(v.arm != BASE for v in own):
        return None
    shown = palette.ordered([v.arm for v in own])
    rows: Rows = [
        {
            "arm": v.arm,
            "n": v.n,
            "label": f"{v.n}" if v.n else v.arm,
            "score": 100 * v.interval.mean,
            "change": float(v.general_loss_change.mean()),
        }
        for v in own
        if v.general_loss_change is not None
    ]
    seeds = [
        {"arm": v.arm, "n": v.n, "score": 100 * s, "change": float(change)}
        for v in own
        if v.general_loss_change is not None and len(v.by_seed) > 1
        for s, change in zip(v.by_seed, v.general_loss_change, strict=True)
    ]
    name = f"{findings.score_name(task)}, %"
    x = alt.X("change:Q", title="change of held-out general loss, nats per token")
    y = alt.Y("score:Q", title=name, scale=alt.Scale(zero=False))
    tooltip = [
        "arm:N",
        "n:Q",
        alt.Tooltip("score:Q", title=name, format=".1f"),
        alt.Tooltip("change:Q", format="+.2f"),
    ]
    base = rows_of(rows).encode(x=x, y=y, color=palette.colour(shown))
    layers: list[Any] = [
        base.mark_line(strokeWidth=1.2, opacity=0.5).encode(order="n:Q"),
        base.mark_point(filled=True, size=80, opacity=1).encode(
            shape=palette.shape(shown), tooltip=tooltip
        ),
        rows_of(rows).mark_text(dy=-11).encode(x=x, y=y, text="label:N"),
    ]
    if dots(seeds):
        cloud = rows_of(seeds).mark_circle(size=20, opacity=0.35)
        layers.insert(0, cloud.encode(x=x, y=y, color=palette.colour(shown), tooltip=tooltip))
    title = f"{findings.title(task)}: score against forgetting"
    words = "Score against the change of held-out general loss. " + " ".join(
        f"{row['arm']} at n = {row['n']}: {row['score']:.1f} % and {signed(row['change'], 2)} nats."
        for row in rows
    )
    grid = Grid(
        title,
        ("n", "arm", name, "change of held-out general loss"),
        [
            (
                f"{row['n']:,}" if row["n"] else NONE,
                row["arm"],
                f"{row['score']:.1f}",
                signed(row["change"], 2),
            )
            for row in sorted(rows, key=lambda row: row["n"])
        ],
    )
    return chart_of(f"forgetting-{task}", title, words, layers, grid)


def _reached(c: Convergence) -> str:
    if c.ratio is None:
        return (
            f"{c.arm} reaches the lowest loss of {c.against} with {c.n_reached} of "
            f"{counted(len(c.seeds), 'seed')}."
        )
    return f"{c.arm} reaches the lowest loss of {c.against} in {c.ratio:.2f} times its steps."
