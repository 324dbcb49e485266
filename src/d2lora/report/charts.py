"""The charts of a report: one specification each, drawn as a PNG and, live, in the page."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from d2lora.findings import BASE, Convergence, Findings, Level, range_said, signed
from d2lora.grids import Grid
from d2lora.report.canvas import Chart, Palette, chart_of
from d2lora.report.tables import NONE, percent
from d2lora.stats import Difference

Rows = list[dict[str, Any]]
DODGE = 1.035
"""Factor between arms at one n, so that intervals do not hide each other."""
SMALL_HEIGHT = 200


def charts(findings: Findings, palette: Palette) -> dict[str, list[Chart]]:
    """Return the charts of every section; a section without numbers has none."""
    tasks = findings.plan.tasks
    sections: dict[str, list[Chart | None]] = {
        "score": [score_over_n(findings, palette, task) for task in tasks],
        "difference": [differences(findings, palette, task) for task in tasks],
        "curves": [
            curves(findings, palette, task, n) for task in tasks for n in findings.plan.sizes
        ],
        "forgetting": [forgetting(findings, palette, task) for task in tasks],
    }
    return {name: [c for c in own if c is not None] for name, own in sections.items()}


def score_over_n(findings: Findings, palette: Palette, task: str) -> Chart | None:
    """Draw the score over n with intervals, every seed a dot; arms without n as lines."""
    own = [v for v in findings.levels if v.task == task]
    sized = [v for v in own if v.n]
    if not sized:
        return None
    shown = palette.ordered([v.arm for v in sized])
    flat = [v for v in own if not v.n]
    means = [
        {**_interval(v), "x": v.n * _dodge(shown, v.arm), "seeds": len(v.scores)} for v in sized
    ]
    seeds = [
        {"arm": v.arm, "n": v.n, "x": v.n * _dodge(shown, v.arm), "score": 100 * s, "seed": i}
        for v in sized
        for i, s in enumerate(v.by_seed)
    ]
    name = f"{findings.score_name(task)}, %"
    x = _over_n(sized)
    colour = palette.colour(shown)
    y = alt.Y("score:Q", title=name, scale=alt.Scale(zero=False))
    told = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("n:Q"),
        alt.Tooltip("score:Q", title=name, format=".1f"),
    ]
    ends = [alt.Tooltip("low:Q", format=".1f"), alt.Tooltip("high:Q", format=".1f")]
    base = _data(means).encode(x=x, color=colour)
    layers: list[Any] = []
    for level in flat:
        rule = _data([{"arm": level.arm, "score": 100 * level.interval.mean}])
        layers.append(rule.mark_rule(strokeDash=[4, 4]).encode(y=y, tooltip=[told[0], told[2]]))
        layers.append(
            rule.mark_text(align="right", dy=-6).encode(x=alt.value("width"), y=y, text="arm:N")
        )
    layers += [
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q"), y2="high:Q"),
        _data(seeds)
        .mark_circle(size=22, opacity=0.4)
        .encode(x=x, y=y, color=colour, tooltip=[*told, alt.Tooltip("seed:Q")]),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            y=y, shape=palette.shape(shown), tooltip=[*told, *ends]
        ),
    ]
    rows = [
        (
            f"{v.n:,}" if v.n else NONE,
            v.arm,
            percent(v.interval.mean),
            f"{percent(v.interval.low)} to {percent(v.interval.high)}",
            ", ".join(percent(s) for s in v.by_seed),
        )
        for v in sorted(own, key=lambda v: v.n)
    ]
    title = f"{findings.title(task)}: {findings.score_name(task)} over n"
    words = (
        f"Line chart of {findings.score_name(task)} in percent over the task size n. "
        + " ".join(
            f"{arm}: "
            + ", ".join(f"{percent(v.interval.mean)} at n = {v.n}" for v in _by(sized, arm))
            + "."
            for arm in shown
        )
    )
    grid = Grid(title, ("n", "arm", name, "95 % interval", "each seed"), rows)
    return chart_of(f"score-{task}", title, words, layers, grid)


def differences(findings: Findings, palette: Palette, task: str) -> Chart | None:
    """Draw paired differences with intervals; filled where a difference holds for other seeds."""
    own = [c for c in findings.comparisons if c.task == task]
    if not own:
        return None
    shown = palette.ordered([c.arm for c in own])
    means: Rows = [
        {
            "arm": c.arm,
            "against": c.against,
            "n": c.n,
            "x": c.n * _dodge(shown, c.arm),
            "difference": 100 * c.difference.mean,
            "low": 100 * c.difference.low,
            "high": 100 * c.difference.high,
            **_over_seeds(c.difference),
            "verdict": c.verdict,
        }
        for c in own
    ]
    seeds: Rows = [
        {"arm": c.arm, "n": c.n, "x": c.n * _dodge(shown, c.arm), "difference": 100 * d, "seed": i}
        for c in own
        for i, d in enumerate(c.difference.by_seed)
    ]
    x = _over_n(own)
    y = alt.Y("difference:Q", title="difference, points")
    colour = palette.colour(shown)
    base = _data(means).encode(x=x, color=colour)
    told = [
        alt.Tooltip(f"{name}:N") for name in ("arm", "against")
    ] + [alt.Tooltip("n:Q")]  # fmt: skip
    names = ("difference", "low", "high", "lowest", "highest")
    numbers = [alt.Tooltip(f"{name}:Q", format="+.1f") for name in names]
    tips = [*told, *numbers, alt.Tooltip("verdict:N")]
    layers: list[Any] = [
        alt.Chart(alt.Data(values=[{}]))
        .mark_rule(strokeWidth=1.5, aria=False)
        .encode(y=alt.datum(0)),
        base.mark_rule(strokeWidth=1, opacity=0.7).encode(y=alt.Y("lowest:Q"), y2="highest:Q"),
        base.mark_rule(strokeWidth=3).encode(y=alt.Y("low:Q"), y2="high:Q"),
        _data(seeds)
        .mark_circle(size=22, opacity=0.4)
        .encode(x=x, y=y, color=colour, tooltip=["arm:N", "n:Q", "seed:Q", numbers[0]]),
    ]
    for filled in (False, True):
        points = [row for row in means if (row["verdict"] in ("helps", "hurts")) == filled]
        if points:
            mark = _data(points).mark_point(filled=filled, size=80, strokeWidth=2, opacity=1)
            shape = palette.shape(shown)
            layers.append(mark.encode(x=x, y=y, color=colour, shape=shape, tooltip=tips))
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
        for c in sorted(own, key=lambda c: c.n)
    ]
    title = f"{findings.title(task)}: difference in {findings.score_name(task)}"
    words = (
        "Paired differences over the task size n, with 95 % intervals: thick over test rows, thin "
        "over seeds too. "
    ) + " ".join(
        f"{c.arm} minus {c.against} at n = {c.n}: "
        f"{signed(100 * c.difference.mean)} points, {c.verdict}."
        for c in own
    )
    intervals = ("95 % interval", "over seeds too")
    columns = ("n", "arm", "against", "difference", *intervals, "each seed", "verdict")
    return chart_of(f"difference-{task}", title, words, layers, Grid(title, columns, rows))


def _over_seeds(d: Difference) -> dict[str, float]:
    low, high = d.over_seeds or (d.low, d.high)
    return {"lowest": 100 * low, "highest": 100 * high}


def curves(findings: Findings, palette: Palette, task: str, n: int) -> Chart | None:
    """Draw validation loss over steps of every arm that was tried on rows held out of the n."""
    own = [c for c in findings.convergence if (c.task, c.n) == (task, n)]
    if not own:
        return None
    lines = {arm: curve for c in own for arm, curve in c.curves.items()}
    shown = palette.ordered(list(lines))
    rows = [{"arm": arm, "step": step, "loss": loss} for arm in shown for step, loss in lines[arm]]
    x = alt.X("step:Q", title="optimizer step")
    y = alt.Y("loss:Q", title="validation loss", scale=alt.Scale(zero=False))
    told = ["arm:N", "step:Q", alt.Tooltip("loss:Q", format=".3f")]
    base = _data(rows).encode(x=x, y=y, color=palette.colour(shown), tooltip=told)
    ends = [{"loss": lines[c.against][-1][1]} for c in own[:1]]
    layers = [
        _data(ends).mark_rule(strokeDash=[4, 4]).encode(y=y),
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
    """Draw what was learnt against what was forgotten, a point an arm and n."""
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
    x = alt.X("change:Q", title="change of loss on general text, nats per token")
    y = alt.Y("score:Q", title=name, scale=alt.Scale(zero=False))
    told = [
        "arm:N",
        "n:Q",
        alt.Tooltip("score:Q", title=name, format=".1f"),
        alt.Tooltip("change:Q", format="+.2f"),
    ]
    base = _data(rows).encode(x=x, y=y, color=palette.colour(shown))
    layers: list[Any] = [
        base.mark_line(strokeWidth=1.2, opacity=0.5).encode(order="n:Q"),
        base.mark_point(filled=True, size=80, opacity=1).encode(
            shape=palette.shape(shown), tooltip=told
        ),
        _data(rows).mark_text(dy=-11).encode(x=x, y=y, text="label:N"),
    ]
    if seeds:
        dots = _data(seeds).mark_circle(size=20, opacity=0.35)
        layers.insert(0, dots.encode(x=x, y=y, color=palette.colour(shown), tooltip=told))
    title = f"{findings.title(task)}: learnt and forgotten"
    words = "Score against the change of loss on general text. " + " ".join(
        f"{row['arm']} at n = {row['n']}: {row['score']:.1f} % and {signed(row['change'], 2)} nats."
        for row in rows
    )
    grid = Grid(
        title,
        ("n", "arm", name, "change of general loss"),
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


def _data(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows))


def _over_n(own: Sequence[Any]) -> alt.X:
    sizes = sorted({v.n for v in own})
    scale = alt.Scale(type="log", domain=[sizes[0] / 1.25, sizes[-1] * 1.25], nice=False)
    axis = alt.Axis(values=sizes, format="d", labelOverlap=True)
    return alt.X("x:Q", title="task examples n, logarithmic", scale=scale, axis=axis)


def _dodge(shown: Sequence[str], arm: str) -> float:
    return DODGE ** (shown.index(arm) - (len(shown) - 1) / 2)


def _interval(level: Level) -> dict[str, Any]:
    i = level.interval
    numbers = {"score": 100 * i.mean, "low": 100 * i.low, "high": 100 * i.high}
    return {"arm": level.arm, "n": level.n, **numbers}


def _by(levels: Sequence[Level], arm: str) -> list[Level]:
    return sorted((v for v in levels if v.arm == arm), key=lambda v: v.n)


def _reached(c: Convergence) -> str:
    if c.steps is None:
        return f"{c.arm} does not reach the final loss of {c.against} ({c.n_steps:.0f} steps)."
    steps = f"{c.steps:.0f} of {c.n_steps:.0f} steps"
    return f"{c.arm} reaches the final loss of {c.against} after {steps}."
