"""BLEU and chrF of a whole test set, with one or several references, as by sacrebleu."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from d2lora.evaluation.counts import Array, Column, Counts
from d2lora.evaluation.metrics.metric import Scored


def bleu(scored: Sequence[Scored]) -> dict[str, Column]:
    """Score by BLEU with sacrebleu's own settings (`tok:13a|smooth:exp`)."""
    from sacrebleu.metrics import BLEU

    return {"bleu": _counts(BLEU(force=True), scored)}  # outputs may end in " ." without a warning


def chrf(scored: Sequence[Scored]) -> dict[str, Column]:
    """Score by chrF2: F2 of n-grams of one to six characters."""
    from sacrebleu.metrics import CHRF

    return {"chrf": _counts(CHRF(), scored)}


def _counts(metric: Any, scored: Sequence[Scored]) -> Counts:
    """Count as `sacrebleu.significance` does, by methods that have no public names."""
    # An empty reference is a missing one to sacrebleu, a blank one is not.
    references = [[text for text in row.references if text] or [" "] for row in scored]
    streams = list(zip_longest(*references))
    rows = metric._extract_corpus_statistics([row.output for row in scored], streams)  # noqa: SLF001

    def of_sums(sums: Array) -> Array:
        scores = (metric._compute_score_from_stats(one).score for one in sums.tolist())  # noqa: SLF001
        return np.fromiter(scores, dtype=float) / 100

    return Counts(np.array(rows, dtype=float), of_sums)
