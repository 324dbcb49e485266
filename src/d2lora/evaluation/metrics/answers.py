"""Is an answer the right one: exactly, as SQuAD compares answers, or by its last number."""

import re
import string
from collections import Counter

from d2lora.data.answers import flexible_answer, strict_answer, target_answer
from d2lora.evaluation.metrics.metric import Scores

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(output: str, target: str) -> Scores:
    """Score 1 where both are the same text, white space around them aside."""
    return {"accuracy": float(output.strip() == target.strip())}


def exact_match(output: str, target: str) -> Scores:
    """Score 1 where both have the same words, as in SQuAD."""
    return {"exact_match": float(_words(output) == _words(target))}


def token_f1(output: str, target: str) -> Scores:
    """Score the words that both have, as in SQuAD: F1 of the words of the one in the other."""
    found, wanted = _words(output), _words(target)
    common = (Counter(found) & Counter(wanted)).total()
    return {"token_f1": 2 * common / max(1, len(found) + len(wanted))}


def gsm8k(output: str, target: str) -> Scores:
    """Score a worked solution by its final number, strictly (`#### N`) and flexibly."""
    wanted = target_answer(target)
    strict, flexible = strict_answer(output), flexible_answer(output, target)
    return {
        "exact_match": float(strict is not None and strict == wanted),
        "exact_match_flexible": float(flexible is not None and flexible == wanted),
    }


def _words(text: str) -> list[str]:
    """Return words as evaluate-v1.1.py of SQuAD separates them.

    In lower case, without ASCII punctuation and English articles (rajpurkar/SQuAD-explorer,
    `normalize_answer`). Of an answer that is nothing else, such as the choice A or `?`, they stay:
    an empty output does not equal it.
    """
    lower = text.lower()
    plain = lower.translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split() or plain.split() or lower.split()
