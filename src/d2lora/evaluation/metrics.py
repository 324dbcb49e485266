"""Scores of one output against one target. Pure functions; 1.0 is best, 0.0 worst."""

import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from d2lora.data.answers import flexible_answer, strict_answer, target_answer
from d2lora.data.words import words_of

Scores = dict[str, float]


def exact_match(output: str, target: str) -> Scores:
    """Score a worked solution by its final number, strictly (`#### N`) and flexibly."""
    wanted = target_answer(target)
    strict, flexible = strict_answer(output), flexible_answer(output, target)
    return {
        "exact_match": float(strict is not None and strict == wanted),
        "exact_match_flexible": float(flexible is not None and flexible == wanted),
    }


def rouge(output: str, target: str) -> Scores:
    """Score a text by ROUGE-1, -2 and -L F-measures with stemming (Lin 2004), in any script."""
    scores = _rouge_scorer().score(target, output)
    return {name: float(score.fmeasure) for name, score in scores.items()}


class _Words(Tokenizer):
    """English words stemmed, as in rouge-score; others as Unicode separates them."""

    def __init__(self) -> None:
        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text, case folded; letters with accents are one character (NFC)."""
        if text.isascii():
            return self._english.tokenize(text)
        folded = unicodedata.normalize("NFC", text.casefold())
        words = words_of(folded) or "".join(folded.split())  # emoji alone are compared, too
        stemmed = (self._english.tokenize(w) if w.isascii() else [w] for w in words)
        return [token for tokens in stemmed for token in tokens]


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


SCORERS: dict[str, Callable[[str, str], Scores]] = {"exact_match": exact_match, "rouge": rouge}
PREFERENCE = ("preference_accuracy", "preference_accuracy_per_token")


class MainScore(NamedTuple):
    """The one score of its kind that verdicts are about."""

    column: str
    title: str
    """Its name in reports."""


MAIN_SCORE = {
    "exact_match": MainScore("exact_match", "exact match"),
    "rouge": MainScore("rougeL", "ROUGE-L"),
    "preference": MainScore("preference_accuracy", "preference accuracy"),
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
    return list(PREFERENCE) if score == "preference" else list(SCORERS[score]("", ""))
