"""F1 of labels, as by scikit-learn's `f1_score`.

A row has one label, its text, or several, a JSON list of texts or numbers. As in scikit-learn,
every label counts that is the target or the output of some row: an output that is no target is one
more label, of F1 0.
"""

from collections.abc import Sequence

import numpy as np

from d2lora.data.paths import as_text
from d2lora.evaluation.counts import Array, Column, Counts, f1_counts, ratio
from d2lora.evaluation.metrics.metric import Scored
from d2lora.evaluation.metrics.structured import parsed


def macro_f1(scored: Sequence[Scored]) -> dict[str, Column]:
    """Score by the mean over labels of the F1 of each."""
    found, wanted = _found_and_wanted(scored)
    labels = sorted(set[str]().union(*found, *wanted))
    place = {label: index for index, label in enumerate(labels)}
    right = _table([f & w for f, w in zip(found, wanted, strict=True)], place)
    sizes = _table(found, place) + _table(wanted, place)
    return {"macro_f1": Counts(np.hstack([right, sizes]), _macro_f1)}


def micro_f1(scored: Sequence[Scored]) -> dict[str, Column]:
    """Score by the F1 of all labels together; where rows have one label it equals accuracy."""
    found, wanted = _found_and_wanted(scored)
    return {"micro_f1": f1_counts(found, wanted)}


def _found_and_wanted(scored: Sequence[Scored]) -> tuple[list[set[str]], list[set[str]]]:
    return [_labels(row.output) for row in scored], [_labels(row.target) for row in scored]


def _labels(text: str) -> set[str]:
    value = parsed(text)
    several = isinstance(value, list) and not any(isinstance(v, list | dict) for v in value)
    return {as_text(label).strip() for label in value} if several else {text.strip()}


def _table(rows: Sequence[set[str]], place: dict[str, int]) -> Array:
    """Return 1 where a row has a label, shape (I, labels)."""
    table = np.zeros((len(rows), len(place)))
    for index, labels in enumerate(rows):
        table[index, [place[label] for label in labels]] = 1
    return table


def _macro_f1(sums: Array) -> Array:
    """Return the mean F1 of the labels that there are, of sums of shape (N, 2 labels)."""
    right, sizes = np.split(sums, 2, axis=1)
    return ratio(ratio(2 * right, sizes).sum(axis=1), (sizes > 0).sum(axis=1).astype(float))
