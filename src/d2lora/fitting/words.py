"""What a fit found, in plain sentences. What was not seen is said as well."""

import math
from typing import Any

import numpy as np

from d2lora.errors import counted
from d2lora.evaluation.counts import per_row
from d2lora.evaluation.crossed import Array
from d2lora.evaluation.metrics import main_column, title_of
from d2lora.evaluation.stats import Interval, mean_interval, paired_difference
from d2lora.fitting.compare import Answers, LearningCurve
from d2lora.fitting.found import Contender, Fitted, Interpolation, Longer, Soup

_POWER = (1.96 + 0.84) ** 2
"""Of a two-sided test at 5 % with a power of 80 %, squared (Cohen 1988, section 2.4)."""


def percent(value: Interval) -> str:
    """Return a score and its interval in %."""
    return f"{100 * value.mean:.1f} % ({100 * value.low:.1f} to {100 * value.high:.1f})"


def score_name(found: Fitted) -> str:
    """Return the name of the task's main score; empty where it has none."""
    for one in found.candidates:
        if one.answers is not None and one.answers.columns:
            return title_of(main_column(tuple(one.answers.columns)))
    return ""


def verdict(found: Fitted) -> list[str]:
    """Return the findings, the most important first."""
    won = found.winner
    lines = [_best(found, won)]
    lines += [
        _against(won, one) for one in found.candidates if one.name != won.name and one.answers
    ]
    lines += _against_prompts(found, won)
    if found.longer is not None:
        lines.append(_longer(found.longer))
    if found.soup is not None:
        lines.append(_soup(found.soup))
    if found.interpolation is not None:
        lines.append(_interpolation(found.interpolation))
    if found.curve is not None:
        lines.append(_more_rows(found.curve, found))
    lines += _tests(found)
    if found.ledger.left_out:
        lines.append(f"Left out, as the budget ends: {', '.join(found.ledger.left_out)}.")
    return lines


def cautions(found: Fitted) -> list[str]:
    """Return what weakens the findings."""
    won = found.winner
    lines = [
        "Scores by cross-validation are of adapters trained on fewer rows than the final one; "
        "their intervals are over rows, and somewhat too narrow, as folds share training rows. "
        "The best of several looks better than it is: a test set tells."
        if won.answers is not None
        else "There was no time to compare answers: initializations are compared by the loss of "
        "trials."
    ]
    if won.tuned.at_edge:
        lines.append(
            f"The learning rate {won.tuned.learning_rate:g} is the last that was tried; one beyond "
            "may be better (--learning-rates)."
        )
    if won.tuned.at_end:
        lines.append(
            "The loss was still falling at the last step that was tried; more may be better "
            "(--steps)."
        )
    if won.tuned.step == 0:
        lines.append(
            "No step of training lowered the loss on rows held out: the adapter is as it was "
            "initialized."
        )
    return lines


def _best(found: Fitted, won: Contender) -> str:
    text = (
        f"Best: {won.name}, learning rate {won.tuned.learning_rate:g}, "
        f"{counted(_steps(found), 'step')}"
        + (f", the average of {len(found.runs)} runs" if len(found.runs) > 1 else "")
        + (f", {found.share:g} of the way from the initialization" if found.share < 1 else "")
    )
    answers = found.answers
    if answers is None:
        return f"{text}."
    rows = counted(len(found.data.examples), "row")
    held = "each answered without having been trained on"
    if answers.score is None:
        return f"{text}: loss {answers.loss:.3f} nats per token over {rows}, {held}."
    return f"{text}: {score_name(found)} {percent(answers.score)} over {rows}, {held}."


def _steps(found: Fitted) -> int:
    run = found.runs[0]
    return min(run.max_steps or 0, run.stop_step or run.max_steps or 0)


def _against(won: Contender, other: Contender) -> str:
    assert won.answers is not None
    assert other.answers is not None
    return f"{_subject(won.name)} against {other.name}: {_change(won.answers, other.answers)}"


def _subject(name: str) -> str:
    return name[:1].upper() + name[1:]


def _change(better: Answers, other: Answers) -> str:
    """Return how much higher one scores than another, and what it would take to be surer."""
    change = better.change_from(other)
    if change is None:
        low, high, mean = _loss_change(better, other)
        seen = "lower" if high < 0 else "higher" if low > 0 else "no difference seen"
        return f"loss {mean:+.3f} nats per token ({low:+.3f} to {high:+.3f}): {seen}."
    text = f"{100 * change.mean:+.1f} points ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
    if change.low > 0:
        return f"{text}: helps, with these rows."
    if change.high < 0:
        return f"{text}: hurts, with these rows."
    assert better.main is not None
    assert other.main is not None
    need = _rows_to_see(per_row(better.main) - per_row(other.main))
    surer = f"; some {need:,} rows would show a difference of that size" if need else ""
    loss = better.loss - other.loss
    return f"{text}: no difference seen{surer}; loss {loss:+.3f} nats per token."


def _loss_change(better: Answers, other: Answers) -> tuple[float, float, float]:
    change = paired_difference(other.losses[None], better.losses[None])
    return change.low, change.high, change.mean


def _rows_to_see(differences: Array) -> int | None:
    """Return the rows at which a mean difference of this size would show; None for none."""
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    if mean == 0 or spread == 0:
        return None
    rows = math.ceil(_POWER * (spread / mean) ** 2)
    # Two digits are all that such an estimate is worth.
    digits = max(0, len(str(rows)) - 2)
    return round(rows, -digits)


def _against_prompts(found: Fitted, won: Contender) -> list[str]:
    if won.answers is None:
        return []
    lines: list[str] = []
    for name, answers in found.prompted.items():
        text = f"Against {name}: {_change(won.answers, answers)}"
        if answers.beats(won.answers):
            text += " Prompting does better than training here: no adapter is needed."
        lines.append(text)
    return lines


def _longer(longer: Longer) -> str:
    whole, stopped = longer.whole, longer.stopped
    assert whole.answers is not None
    assert stopped.answers is not None
    fate = "kept" if longer.kept else "not kept"
    return (
        f"Trained for all {whole.tuned.curve[-1][0]} steps against {stopped.tuned.step}, where the "
        f"loss is lowest: {_change(whole.answers, stopped.answers)} It is {fate}."
    )


def _soup(soup: Soup) -> str:
    fate = "kept" if soup.kept else "not kept"
    return (
        f"The average of {soup.n_runs} runs against one of them: "
        f"{_change(soup.average, soup.single)} It is {fate}."
    )


def _interpolation(between: Interpolation) -> str:
    fate = "kept" if between.kept else "not kept"
    return (
        f"{between.best:g} of the way from the initialization against all of it: "
        f"{_change(between.tried[between.best], between.end)} It is {fate}."
    )


def _more_rows(curve: LearningCurve, found: Fitted) -> str:
    n = len(found.data.examples)
    sizes = f"from {curve.sizes[0]:g} to {curve.sizes[-1]:g} training rows"
    per, twice = curve.per_doubling, curve.twice
    if not score_name(found):
        return (
            f"Twice the rows brought {-per.mean:+.3f} nats per token ({-per.high:+.3f} to "
            f"{-per.low:+.3f}), {sizes}; if that goes on, {2 * n:,} rows come to about "
            f"{-twice.mean:.3f} ({-twice.high:.3f} to {-twice.low:.3f})."
        )
    low, high = max(0.0, twice.low), min(1.0, twice.high)
    return (
        f"Twice the rows brought {100 * per.mean:+.1f} points ({100 * per.low:+.1f} to "
        f"{100 * per.high:+.1f}), {sizes}; if that goes on, {2 * n:,} rows come to about "
        f"{100 * min(1.0, max(0.0, twice.mean)):.0f} % ({100 * low:.0f} to {100 * high:.0f})."
    )


def _tests(found: Fitted) -> list[str]:
    """Return what test rows, general text and multiple choice say of the adapter."""
    if not found.tests:
        return ["Forgetting was not measured: give --general-text or --choices."]
    base, adapter = found.tests["base"], found.tests["adapter"]
    lines: list[str] = []
    if adapter["scores"]:
        name = main_column(tuple(adapter["scores"]))
        own, of_base = (np.array(one["scores"][name], dtype=float) for one in (adapter, base))
        change = paired_difference(of_base[None], own[None])
        lines.append(
            f"Test rows ({len(own):,}, scored once): {title_of(name)} "
            f"{percent(mean_interval(own))}, the base {percent(mean_interval(of_base))}: "
            f"{100 * change.mean:+.1f} points ({100 * change.low:+.1f} to "
            f"{100 * change.high:+.1f})."
        )
    lines += _forgotten(base, adapter)
    return lines


def _forgotten(base: dict[str, Any], adapter: dict[str, Any]) -> list[str]:
    parts: list[str] = []
    before, after = base["general_loss"], adapter["general_loss"]
    if isinstance(before, float) and isinstance(after, float):
        parts.append(f"{after - before:+.3f} nats per token on general text")
    right, own = base["choices_right"], adapter["choices_right"]
    if isinstance(right, list) and isinstance(own, list):
        change = 100 * (np.mean(np.array(own)) - np.mean(np.array(right)))
        parts.append(f"{change:+.1f} points on multiple choice")
    if not parts:
        return ["Forgetting was not measured: give --general-text or --choices."]
    return [f"Forgotten, against the base: {' and '.join(parts)}."]


def bill(found: Fitted, n_workers: int) -> str:
    """Return what the fit took."""
    return f"{found.ledger.spent_s / 60:.1f} minutes of runs, {n_workers} at a time"
