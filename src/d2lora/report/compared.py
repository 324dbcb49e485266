"""The charts that compare arms: few as lines over the task size n, many in rows at one n.

Both layouts draw the same marks, with the axis of values upright or lying.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from d2lora.report.canvas import HEIGHT, Chart, Palette, Rows, chart_of, dots, rows_of
from d2lora.report.findings import Comparison, Findings, Level
from d2lora.report.numbers import signed
from d2lora.report.tables import chart_score_grid, difference_grid, percent

DODGE = 1.035
"""Factor between arms at one n, so that intervals do not hide each other."""
ROW_HEIGHT = 24


@dataclass(frozen=True)
class Layout:
    """Where an arm at a size n stands, and along which axis its values run."""

    place: alt.X | alt.Y
    """Of a field `place`."""
    at: Callable[[str, int], float | str]
    """The place of an arm at a size."""
    rows: bool
    """Arms stand in rows, their values run to the right; else sizes do, and values upward."""
    height: int

    @classmethod
    def over_n(cls, shown: Sequence[str], own: Sequence[Level | Comparison]) -> "Layout":
        """Lay sizes out on a logarithmic axis, arms beside each other at each."""
        sizes = sorted({v.n for v in own})
        scale = alt.Scale(type="log", domain=[sizes[0] / 1.25, sizes[-1] * 1.25], nice=False)
        axis = alt.Axis(values=sizes, format="d", labelOverlap=True)
        place = alt.X("place:Q", title="task examples n, logarithmic", scale=scale, axis=axis)

        def at(arm: str, n: int) -> float:
            return n * DODGE ** (shown.index(arm) - (len(shown) - 1) / 2)

        return cls(place, at, rows=False, height=HEIGHT)

    @classmethod
    def in_rows(cls, labels: dict[str, str]) -> "Layout":
        """Lay arms out in rows, by their labels."""
        axis = alt.Axis(labelLimit=160, grid=True)
        place = alt.Y("place:N", title=None, sort=list(labels.values()), axis=axis)
        return cls(place, lambda arm, _: labels[arm], rows=True, height=ROW_HEIGHT * len(labels))

    def points(self, field: str, title: str, *, zero: bool) -> dict[str, Any]:
        """Return the encoding of points at the values of a field."""
        value = alt.X if self.rows else alt.Y
        axis: dict[str, Any] = {"axis": alt.Axis(grid=True)} if self.rows else {}
        along = value(f"{field}:Q", title=title, scale=alt.Scale(zero=zero), **axis)
        return {"y": self.place, "x": along} if self.rows else {"x": self.place, "y": along}

    def spans(self, low: str, high: str) -> dict[str, Any]:
        """Return the encoding of rules from the values of one field to those of another."""
        if self.rows:
            return {"y": self.place, "x": alt.X(f"{low}:Q"), "x2": f"{high}:Q"}
        return {"x": self.place, "y": alt.Y(f"{low}:Q"), "y2": f"{high}:Q"}


def scores(findings: Findings, palette: Palette, task: str, n: int | None = None) -> Chart | None:
    """Draw scores with intervals, every seed a dot; with n in rows at that size, else over n.

    Arms without task rows are lines over n, or separate rows.
    """
    own = [v for v in findings.levels if v.task == task and n in (None, v.n or n)]
    sized = [v for v in own if v.n]
    if not sized:
        return None
    flat = [v for v in own if not v.n]
    score, title = findings.score_name(task), findings.title(task)
    if n is None:
        shown, drawn = palette.ordered([v.arm for v in sized]), sized
        layout = Layout.over_n(shown, sized)
        name, title = f"score-{task}", f"{title}: {score} over n"
    else:
        shown, drawn = palette.ordered([v.arm for v in own]), own
        layout = Layout.in_rows({arm: arm for arm in shown})
        name, title = f"score-{task}-{n}", f"{title}: {score} at n = {n:,}"
    means: Rows = [_level_row(v) | {"place": layout.at(v.arm, v.n)} for v in drawn]
    seeds: Rows = [
        {"arm": v.arm, "n": v.n, "place": layout.at(v.arm, v.n), "score": 100 * s, "seed": i}
        for v in drawn
        if len(v.by_seed) > 1
        for i, s in enumerate(v.by_seed)
    ]
    points = layout.points("score", f"{score}, %", zero=False)
    tooltip = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("n:Q"),
        alt.Tooltip("score:Q", title=f"{score}, %", format=".1f"),
    ]
    ends = [alt.Tooltip("low:Q", format=".1f"), alt.Tooltip("high:Q", format=".1f")]
    colour, shape = _look(palette, shown, layout)
    base = rows_of(means).encode(color=colour)
    layers: list[Any] = []
    if n is None:
        for level in flat:
            rule = rows_of([{"arm": level.arm, "score": 100 * level.interval.mean}])
            y = {"y": points["y"]}
            layers += [
                rule.mark_rule(strokeDash=[4, 4]).encode(tooltip=[tooltip[0], tooltip[2]], **y),
                rule.mark_text(align="right", dy=-6).encode(
                    x=alt.value("width"), text="arm:N", **y
                ),
            ]
        layers.append(base.mark_line(strokeWidth=2).encode(**points))
    layers += [
        base.mark_rule(strokeWidth=1.5).encode(**layout.spans("low", "high")),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            shape=shape, tooltip=[*tooltip, *ends], **points
        ),
    ]
    if dots(seeds):
        cloud = rows_of(seeds).mark_circle(size=22, opacity=0.4)
        tips = [*tooltip, alt.Tooltip("seed:Q")]
        layers.insert(-1, cloud.encode(color=colour, tooltip=tips, **points))
    words = f"{score} in percent. " + " ".join(
        f"{arm}: "
        + ", ".join(
            percent(v.interval.mean) + (f" at n = {v.n}" if v.n else "")
            for v in sorted(drawn, key=lambda v: v.n)
            if v.arm == arm
        )
        + "."
        for arm in shown
    )
    return chart_of(
        name, title, words, layers, chart_score_grid(findings, own, title), layout.height
    )


def differences(
    findings: Findings, palette: Palette, task: str, n: int | None = None
) -> Chart | None:
    """Draw paired differences with intervals; with n in rows at that size, else over n.

    A mark is filled where there is a verdict.
    """
    own = [c for c in findings.comparisons if c.task == task and n in (None, c.n)]
    if not own:
        return None
    shown = palette.ordered([c.arm for c in own])
    title = f"{findings.title(task)}: difference in {findings.score_name(task)}"
    if n is None:
        layout, name = Layout.over_n(shown, own), f"difference-{task}"
    else:
        against = {c.arm: f"{c.arm} - {c.against}" for c in own}
        layout = Layout.in_rows({arm: against[arm] for arm in shown})
        name, title = f"difference-{task}-{n}", f"{title} at n = {n:,}"
    means: Rows = [_difference_row(c) | {"place": layout.at(c.arm, c.n)} for c in own]
    seeds: Rows = [
        {"arm": c.arm, "n": c.n, "place": layout.at(c.arm, c.n), "difference": 100 * d, "seed": i}
        for c in own
        for i, d in enumerate(c.difference.by_seed)
    ]
    numbers = [
        alt.Tooltip(f"{name}:Q", format="+.1f")
        for name in ("difference", "low", "high", "lowest", "highest")
    ]
    tips = ["arm:N", "against:N", "n:Q", *numbers, "verdict:N"]
    points = layout.points("difference", "difference, points", zero=True)
    colour, shape = _look(palette, shown, layout)
    base = rows_of(means).encode(color=colour)
    zero = {"x" if layout.rows else "y": alt.datum(0)}
    layers: list[Any] = [
        rows_of([{}]).mark_rule(strokeWidth=1.5, aria=False).encode(**zero),
        base.mark_rule(strokeWidth=1, opacity=0.7).encode(**layout.spans("lowest", "highest")),
        base.mark_rule(strokeWidth=3).encode(**layout.spans("low", "high")),
        rows_of(dots(seeds))
        .mark_circle(size=22, opacity=0.4)
        .encode(color=colour, tooltip=["arm:N", "n:Q", "seed:Q", numbers[0]], **points),
    ]
    for filled in (False, True):
        held = [row for row in means if (row["verdict"] in ("helps", "hurts")) == filled]
        if held:
            mark = rows_of(held).mark_point(filled=filled, size=80, strokeWidth=2, opacity=1)
            layers.append(mark.encode(color=colour, shape=shape, tooltip=tips, **points))
    words = (
        "Paired differences with 95 % CI: thick over test rows alone, thin over items and seeds. "
    ) + " ".join(
        f"{c.arm} minus {c.against} at n = {c.n}: "
        f"{signed(100 * c.difference.mean)} points, {c.verdict}."
        for c in own
    )
    return chart_of(name, title, words, layers, difference_grid(own, title), layout.height)


def _look(palette: Palette, shown: Sequence[str], layout: Layout) -> tuple[alt.Color, alt.Shape]:
    """Return colour and shape of the arms; rows have their names beside them, lines a legend."""
    colour, shape = palette.colour(shown), palette.shape(shown)
    return (colour.legend(None), shape.legend(None)) if layout.rows else (colour, shape)


def _level_row(level: Level) -> dict[str, Any]:
    i = level.interval
    numbers = {"score": 100 * i.mean, "low": 100 * i.low, "high": 100 * i.high}
    return {"arm": level.arm, "n": level.n, **numbers}


def _difference_row(c: Comparison) -> dict[str, Any]:
    d = c.difference
    lowest, highest = d.over_seeds or (d.low, d.high)
    numbers = {
        "difference": d.mean, "low": d.low, "high": d.high, "lowest": lowest, "highest": highest,
    }  # fmt: skip
    row = {"arm": c.arm, "against": c.against, "n": c.n, "verdict": c.verdict}
    return row | {name: 100 * value for name, value in numbers.items()}
