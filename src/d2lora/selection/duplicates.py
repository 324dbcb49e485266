"""Exact and near duplicates among examples; the first of its kind is kept.

Near duplicates are found by MinHash with locality-sensitive hashing over 5-word shingles (Broder
1997; Lee et al. 2022, arXiv 2107.06499, section 4.2), and each candidate is compared with the
kept row itself, so nothing is dropped on an estimate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from d2lora.data.ngrams import overlap, shingles, words
from d2lora.data.rows import Example

SHINGLE_WORDS = 5
N_PERMUTATIONS, N_BANDS, _SEED = 128, 32, 1
ANSWER_OVERLAP = 0.5
"""Rows whose answers share fewer of their words teach different things, whatever they quote."""


@dataclass(frozen=True)
class Duplicate:
    """An example that says what an earlier one says; both are indices."""

    index: int
    of: int
    similarity: float
    """Jaccard similarity of the shingles; 1 for an exact duplicate."""


class Duplicates:
    """Takes examples one by one and remembers those that are new."""

    def __init__(self, threshold: float, examples: Sequence[Example]) -> None:
        """Make an empty memory.

        Args:
            threshold: Least Jaccard similarity of a near duplicate. 1: exact ones only.
            examples: What the indices point into; may stand on disk.
        """
        self._threshold = threshold
        self._examples = examples
        self._exact: dict[bytes, int] = {}
        import rensa

        self._rensa: Any = rensa  # it has no types
        self._index = self._rensa.RMinHashLSH(threshold, N_PERMUTATIONS, N_BANDS)

    def add(self, index: int, example: Example) -> Duplicate | None:
        """Return what the example repeats; None where it is new, and is remembered."""
        key = _exact_key(example)
        if key in self._exact:
            return Duplicate(index, self._exact[key], 1.0)
        if self._threshold < 1:
            found = self._near(index, example)
            if found is not None:
                return found
        self._exact[key] = index
        return None

    def _near(self, index: int, example: Example) -> Duplicate | None:
        mine = shingles(example.text, SHINGLE_WORDS)
        sketch = self._rensa.RMinHash(N_PERMUTATIONS, _SEED)
        sketch.update([value.tobytes() for value in mine])
        for other in sorted(self._index.query(sketch)):
            kept = self._examples[other]
            similarity = overlap(mine, shingles(kept.text, SHINGLE_WORDS))
            if similarity >= self._threshold and _same_answer(example, kept):
                return Duplicate(index, other, similarity)
        self._index.insert(index, sketch)
        return None


def duplicates(examples: Sequence[Example], threshold: float) -> Iterator[Duplicate]:
    """Find the examples that repeat an earlier one."""
    memory = Duplicates(threshold, examples)
    for index, example in enumerate(examples):
        found = memory.add(index, example)
        if found is not None:
            yield found


def _exact_key(example: Example) -> bytes:
    answer = " ".join(words(example.completion)) or example.completion.strip()
    text = f"{' '.join(words(example.question))}\n{answer}"
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _same_answer(first: Example, second: Example) -> bool:
    one, other = shingles(first.completion, 1), shingles(second.completion, 1)
    return overlap(one, other) >= ANSWER_OVERLAP
