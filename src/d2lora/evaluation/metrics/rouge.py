"""ROUGE F-measures with stemming (Lin 2004), in any script; of several references the best."""

import unicodedata
from functools import cache

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from d2lora.data.words import words_of
from d2lora.evaluation.metrics.metric import Scored, Scores


def rouge(scored: Scored) -> Scores:
    """Score a text by ROUGE-L, -1 and -2, each by its best reference."""
    return _scores(("rougeL", "rouge1", "rouge2"), scored)


def rouge_lsum(scored: Scored) -> Scores:
    """Score a text of several sentences, one a line, by ROUGE-Lsum."""
    return _scores(("rougeLsum",), scored)


def _scores(kinds: tuple[str, ...], scored: Scored) -> Scores:
    scores = _scorer(kinds).score_multi(scored.references, scored.output)
    return {name: float(score.fmeasure) for name, score in scores.items()}


@cache
def _scorer(kinds: tuple[str, ...]) -> RougeScorer:
    return RougeScorer(list(kinds), tokenizer=_Words())


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
