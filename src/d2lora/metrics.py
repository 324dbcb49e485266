"""Scores of one output against one target. Pure functions; 1.0 is best, 0.0 worst."""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

Scores = dict[str, float]

# The strict pattern is the one of GSM8K's authors: github.com/openai/grade-school-math,
# grade_school_math/dataset.py, ANS_RE. A number may carry signs, thousands' commas and a dollar.
_STRICT = re.compile(r"####\s*(-?\$?-?[0-9][0-9,]*\.?[0-9]*)")
_NUMBER = re.compile(r"-?\$?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def as_number(text: str) -> Decimal | None:
    """Return the value of a number as written: 1,000 = 1000.0 = $1000. None if it is none."""
    try:
        return Decimal(text.replace(",", "").replace("$", "").strip().rstrip("."))
    except InvalidOperation:
        return None


def strict_answer(text: str) -> Decimal | None:
    """Return the number after the first `####`; None where there is none."""
    found = _STRICT.search(text)
    return as_number(found[1]) if found else None


def flexible_answer(text: str) -> Decimal | None:
    """Return the last number of a text; None where there is none.

    As lm-evaluation-harness's "flexible-extract" for GSM8K.
    """
    numbers = _NUMBER.findall(text)
    return as_number(numbers[-1]) if numbers else None


def exact_match(output: str, target: str) -> Scores:
    """Score a worked solution by its final number, strictly (`#### N`) and flexibly."""
    wanted = strict_answer(target)
    if wanted is None:
        wanted = flexible_answer(target)
    strict, flexible = strict_answer(output), flexible_answer(output)
    return {
        "exact_match": float(strict is not None and strict == wanted),
        "exact_match_flexible": float(flexible is not None and flexible == wanted),
    }


def rouge(output: str, target: str) -> Scores:
    """Score a text by ROUGE-1, -2 and -L F-measures with stemming (Lin 2004)."""
    scores = _rouge_scorer().score(target, output)
    return {name: float(score.fmeasure) for name, score in scores.items()}


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


SCORERS: dict[str, Callable[[str, str], Scores]] = {"exact_match": exact_match, "rouge": rouge}
PREFERENCE = ("preference_accuracy", "preference_accuracy_per_token")
MAIN_SCORE = {
    "exact_match": "exact_match",
    "rouge": "rougeL",
    "preference": "preference_accuracy",
}


def preference(log_probabilities: tuple[float, float], lengths: tuple[int, int]) -> Scores:
    """Score a pair: is the chosen completion likelier than the rejected one.

    Args:
        log_probabilities: Summed over the tokens of the chosen and the rejected completion.
        lengths: Their tokens, EOS included.
    """
    chosen, rejected = log_probabilities
    whole = float(chosen > rejected)
    return dict(
        zip(PREFERENCE, (whole, float(chosen / lengths[0] > rejected / lengths[1])), strict=True)
    )


def columns_of(score: str) -> list[str]:
    """Return the names of the scores that a kind of score gives."""
    return list(PREFERENCE) if score == "preference" else list(SCORERS[score]("", "0"))
