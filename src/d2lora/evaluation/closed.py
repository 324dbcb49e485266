"""Closed answers: the likeliest of the labels, by the log-probability of each as a whole answer.

The answer's end is part of it, so that a label which another one starts with is told apart from it,
and what is compared is what training learnt: a label and its end.
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
from d2lora.data.rows import Example
from d2lora.errors import DataError, listed
from d2lora.evaluation.stats import Array
from d2lora.scoring.multiple_choice import continuation_scores
from d2lora.scoring.scorer import TokenScorer

N_BINS = 15


class Chosen(NamedTuple):
    """The label chosen for a row."""

    label: str
    confidence: float
    """Its probability among the labels."""


def choose_labels(
    model: nn.Module,
    base: Base,
    encoder: Encoder,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str],
) -> list[Chosen]:
    """Choose a label for every row; each prompt is computed once.

    Args:
        model: The base, with an adapter or alone.
        base: The base.
        encoder: Of the chat format.
        examples: The rows.
        prompts: Their prompts as token ids.
        labels: What to choose from.

    Raises:
        DataError: If a row is longer than what the base takes; it names all.
    """
    questions = questions_of(encoder, examples, prompts, labels)
    chosen: list[Chosen] = []
    for scores in continuation_scores(TokenScorer(model), questions, base.pad_id):
        best = int(np.argmax(scores))
        total = math.fsum(math.exp(score - scores[best]) for score in scores)
        chosen.append(Chosen(labels[best], 1 / total))
    return chosen


def questions_of(
    encoder: Encoder,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str],
) -> list[Question]:
    """Return rows as multiple-choice questions among the labels.

    Raises:
        DataError: As `choose_labels`.
    """
    if not examples:
        return []
    first, last = (_endings(encoder, example, labels) for example in (examples[0], examples[-1]))
    if first == last:  # answers are encoded the same whatever their prompt
        endings = [first] * len(examples)
    else:
        endings = [_endings(encoder, example, labels) for example in examples]
    rows = [Question(tuple(p), own) for p, own in zip(prompts, endings, strict=True)]
    beyond = [
        f"{example.place}: {len(row.prompt) + max(map(len, row.endings)):,} tokens"
        for example, row in zip(examples, rows, strict=True)
        if len(row.prompt) + max(map(len, row.endings)) > encoder.n_positions
    ]
    if beyond:
        raise DataError(
            f"{len(beyond)} of {len(rows)} rows are longer with a label than the "
            f"{encoder.n_positions:,} tokens that the base takes; shorten them, or set "
            f"--overlong truncate:\n{listed(beyond)}"
        )
    return rows


def _endings(
    encoder: Encoder, example: Example, labels: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    answered = [replace(example, completion=label) for label in labels]
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
