"""Closed answers: the likeliest of the labels, or of a row's own choices.

What is compared is the log-probability of each as a whole answer. Its end is part of it, so that a
label which another one starts with is told apart from it, and what is compared is what training
learnt: a label and its end. Choices that a card compares by character are scored as those of
forgetting are, without an end.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import nn

from d2lora.adapters.base import Base
from d2lora.data.batches import Question
from d2lora.data.encode import Encoder
from d2lora.data.encoded_sets import every
from d2lora.data.options import Per
from d2lora.data.rows import Example
from d2lora.errors import DataError, listed
from d2lora.evaluation.stats import Array
from d2lora.scoring.multiple_choice import continuation_scores
from d2lora.scoring.scorer import TokenScorer

N_BINS = 15


class Chosen(NamedTuple):
    """The label chosen for a row."""

    label: str
    confidence: float | None
    """Its probability among the labels; None where these are compared by character."""


def choose_labels(
    model: nn.Module,
    base: Base,
    encoder: Encoder,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str],
    per: Per = "answer",
) -> list[Chosen]:
    """Choose a label for every row, or one of its choices; each prompt is computed once.

    Args:
        model: The base, with an adapter or alone.
        base: The base.
        encoder: Of the chat format.
        examples: The rows.
        prompts: Their prompts as token ids.
        labels: What to choose from, where rows have no choices of their own.
        per: What is compared.

    Raises:
        DataError: If a row is longer than what the base takes; it names all.
    """
    questions = questions_of(encoder, examples, prompts, labels, per)
    scores = continuation_scores(TokenScorer(model), questions, base.pad_id)
    return [
        _chosen(example.choices or labels, own, per)
        for example, own in zip(examples, scores, strict=True)
    ]


def _chosen(labels: Sequence[str], scores: Sequence[float], per: Per) -> Chosen:
    if per == "character":
        by_length = [score / len(label) for score, label in zip(scores, labels, strict=True)]
        return Chosen(labels[int(np.argmax(by_length))], None)
    best = int(np.argmax(scores))
    total = math.fsum(math.exp(score - scores[best]) for score in scores)
    return Chosen(labels[best], 1 / total)


def longest_answer(encoder: Encoder, examples: Sequence[Example], labels: Sequence[str]) -> int:
    """Return the tokens of the longest label or choice, its end included."""
    asked = examples if examples and examples[0].choices else examples[:1]
    endings = (_endings(encoder, example, labels, "answer") for example in asked)
    return max((len(ids) for own in endings for ids in own), default=0)


def questions_of(
    encoder: Encoder,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str],
    per: Per = "answer",
) -> list[Question]:
    """Return rows as multiple-choice questions among the labels, or among their own choices.

    Raises:
        DataError: As `choose_labels`.
    """
    if not examples:
        return []
    first, last = (
        _endings(encoder, example, labels, per) for example in (examples[0], examples[-1])
    )
    if first == last and not examples[0].choices:  # answers are encoded alike whatever their prompt
        endings = [first] * len(examples)
    else:
        endings = [_endings(encoder, example, labels, per) for example in examples]
    rows = [Question(tuple(p), own) for p, own in zip(prompts, endings, strict=True)]
    beyond = [
        f"{example.place}: {len(row.prompt) + max(map(len, row.endings)):,} tokens"
        for example, row in zip(examples, rows, strict=True)
        if len(row.prompt) + max(map(len, row.endings)) > encoder.n_positions
    ]
    if beyond:
        raise DataError(
            f"{len(beyond)} of {len(rows)} rows are longer with an answer than the "
            f"{encoder.n_positions:,} tokens that the base takes; shorten them, or set "
            f"--overlong truncate:\n{listed(beyond)}"
        )
    return rows


def _endings(
    encoder: Encoder, example: Example, labels: Sequence[str], per: Per
) -> tuple[tuple[int, ...], ...]:
    answered = [replace(example, completion=label) for label in example.choices or labels]
    if per == "character":
        return tuple(every(encoder.answer_ids, answered))
    encoded = every(encoder.encode, answered)
    return tuple(one.ids[one.n_prompt :] for one in encoded)


def calibration_error(confidence: Array, right: Array) -> float:
    """Return the expected calibration error of 15 bins of equal width.

    Guo et al. 2017, arXiv 1706.04599, eq. 3.

    Args:
        confidence: Probability of what was chosen, shape (I,).
        right: 1 where it was right, else 0, shape (I,).
    """
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=N_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
