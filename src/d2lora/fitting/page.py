"""What a fit found: on the terminal, as numbers, and as a page without outside resources."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from d2lora.evaluation.stats import Interval
from d2lora.fitting import words
from d2lora.fitting.compare import Answers
from d2lora.fitting.found import Fitted
from d2lora.report.html import as_is, environment, own_file
from d2lora.runtime.grids import NONE, Grid, as_table
from d2lora.settings import FitSettings
from d2lora.study.plan import StudyPlan

_OUTPUTS = 12
"""Rows whose text is shown."""


def show(found: Fitted, console: Console) -> None:
    """Print the findings."""
    console.print(as_table(candidates(found)))
    for line in [*words.verdict(found), *words.cautions(found)]:
        console.print(line, markup=False)


def candidates(found: Fitted) -> Grid:
    """Return the table of all candidates."""
    name = words.score_name(found)
    score = f"{name}, %" if name else "score"
    rows: list[tuple[str, ...]] = []
    for one in found.candidates:
        setting = f"{one.tuned.learning_rate:g}", str(_end(one.tuned.step, one.tuned.curve))
        rows.append((one.name, *setting, *_scores(one.answers)))
    if found.longer is not None:
        whole = found.longer.whole
        setting = f"{whole.tuned.learning_rate:g}", str(whole.tuned.curve[-1][0])
        rows.append((f"{whole.name}, to the end", *setting, *_scores(whole.answers)))
    if found.soup is not None:
        title = f"{found.winner.name}, average of {found.soup.n_runs}"
        rows.append((title, NONE, NONE, *_scores(found.soup.average)))
    if found.interpolation is not None:
        rows += [
            (f"{found.winner.name}, {share:g} of the way", NONE, NONE, *_scores(answers))
            for share, answers in found.interpolation.tried.items()
        ]
    rows += [(name, NONE, NONE, *_scores(answers)) for name, answers in found.prompted.items()]
    columns = ("what", "learning rate", "steps", score, "nats per token")
    return Grid("Rows answered without having been trained on", columns, rows)


def trials(found: Fitted) -> Grid:
    """Return the table of all trials."""
    rows = [
        (
            one.name,
            f"{t.learning_rate:g}",
            str(t.n_steps),
            str(t.n_folds),
            str(t.step),
            f"{t.loss:.3f}",
        )
        for one in found.candidates
        for t in sorted(one.tried, key=lambda t: (-t.n_folds, t.loss))
    ]
    columns = ("what", "learning rate", "steps", "folds", "best step", "loss, nats per token")
    return Grid("Trials, the loss on rows held out", columns, rows)


def examples(found: Fitted) -> Grid:
    """Return the table of the first rows, and what was answered to them."""
    asked = {"the winner": found.answers, **found.prompted}
    shown = {name: one.outputs for name, one in asked.items() if one is not None and one.outputs}
    rows = [
        (
            example.prompt[-1].content if example.prompt else "",
            example.completion,
            *(outputs[place] for outputs in shown.values()),
        )
        for place, example in enumerate(found.data.examples[:_OUTPUTS])
    ]
    title = "Answers to rows that were not trained on"
    return Grid(title, ("row", "right answer", *shown), rows if shown else [])


def _scores(answers: Answers | None) -> tuple[str, str]:
    if answers is None:
        return NONE, NONE
    score = NONE if answers.score is None else words.percent(answers.score)
    return score.replace(" %", ""), f"{answers.loss:.3f}"


def _end(step: int | None, curve: tuple[tuple[int, float], ...]) -> int:
    return step if step is not None else curve[-1][0]


def to_json(found: Fitted) -> dict[str, Any]:
    """Return the findings as plain values."""
    curve = found.curve
    return {
        "winner": found.winner.name,
        "verdict": words.verdict(found),
        "cautions": words.cautions(found),
        "candidates": [
            {
                "name": one.name,
                "learning_rate": one.tuned.learning_rate,
                "step": one.tuned.step,
                "curve": one.tuned.curve,
                "tried": [vars(tried) for tried in one.tried],
                **_numbers(one.answers),
            }
            for one in found.candidates
        ],
        "prompted": {name: _numbers(answers) for name, answers in found.prompted.items()},
        "average": None
        if found.soup is None
        else {
            "runs": found.soup.n_runs,
            "kept": found.soup.kept,
            "average": _numbers(found.soup.average),
            "one_run": _numbers(found.soup.single),
        },
        "interpolation": None
        if found.interpolation is None
        else {
            "kept": found.interpolation.kept,
            "tried": {f"{s:g}": _numbers(a) for s, a in found.interpolation.tried.items()},
            "end": _numbers(found.interpolation.end),
        },
        "learning_curve": None
        if curve is None
        else {
            "rows": curve.sizes,
            "scores": [vars(score) for score in curve.scores],
            "per_doubling": vars(curve.per_doubling),
            "at_twice": vars(curve.twice),
        },
        "tests": found.tests,
        "left_out": found.ledger.left_out,
        "spent_s": round(found.ledger.spent_s, 1),
    }


def _numbers(answers: Answers | None) -> dict[str, Any]:
    if answers is None:
        return {"score": None, "loss": None}
    score: Interval | None = answers.score
    return {"score": None if score is None else vars(score), "loss": answers.loss}


def page(
    settings: FitSettings,
    plan: StudyPlan,
    found: Fitted,
    commands: str,
    about: Mapping[str, Any],
) -> str:
    """Return the page as HTML; every text is escaped."""
    return (
        environment("d2lora.fitting")
        .get_template("page.html.j2")
        .render(
            style=as_is(own_file("style.css")),
            title=f"The best adapter for {' '.join(settings.data)}",
            facts={
                "base": plan.base,
                "rows": f"{len(found.data.examples):,}",
                "task": found.data.task.name,
                "initializations": str(len(plan.arms)),
                "run": str(about["provenance"]["date"]).partition("T")[0],
            },
            verdict=words.verdict(found),
            cautions=[*words.cautions(found), *about["contamination"]],
            tables=[candidates(found), trials(found)],
            examples=examples(found),
            bill=words.bill(found, found.ledger.n_workers),
            commands=commands,
            settings=settings.to_yaml(),
            made=about["provenance"],
        )
    )
