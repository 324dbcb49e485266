"""Selecting among vectors of length 1: the nearest to examples in turn, or those that cover most.

Shapes: N pool rows, M examples, D numbers of a vector.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from d2lora.selection.cache import Array

if TYPE_CHECKING:
    import faiss

REFERENCES = 2048
"""Rows whose coverage stands for that of the whole pool."""
MISSED = 0.05
"""Chance that a step of the stochastic greedy algorithm sees none of the best candidates."""


def best_likeness(pool_ND: Array, examples_MD: Array) -> Array:
    """Return the largest cosine of each pool row with an example, shape (N,)."""
    scores, _ = _index(examples_MD).search(np.ascontiguousarray(pool_ND), 1)
    return scores[:, 0]


def nearest_in_turn(
    pool_ND: Array, examples_MD: Array, files_M: Sequence[int], m: int
) -> list[tuple[int, int, int, float]]:
    """Let examples choose their nearest free rows in turn; their files take turns first.

    Returns:
        m times the row, the example's place in its file, the file and the cosine.
    """
    index = _index(pool_ND)
    wishes = {
        number: [_wishes(index, examples_MD[row : row + 1], m, len(examples_MD)) for row in rows]
        for number, rows in _grouped(files_M).items()
    }
    turns = {number: _round(queues) for number, queues in wishes.items()}
    taken: set[int] = set()
    chosen: list[tuple[int, int, int, float]] = []
    while len(chosen) < m:
        for number, turn in turns.items():
            if len(chosen) < m:
                place, wish = next(turn)
                row, score = next((r, s) for r, s in wish if r not in taken)
                taken.add(row)
                chosen.append((row, place, number, score))
    return chosen


def facility_location(
    pool_ND: Array, m: int, seed: int, likeness_N: Array | None = None, weight: float = 0.0
) -> list[tuple[int, float]]:
    """Choose greedily for coverage of reference rows and, with a weight, for likeness.

    Coverage of a reference is the largest similarity, from 0 to 1, of a chosen row with it. Each
    step compares as many random candidates as leave a chance of `MISSED` to see none of the best
    m; so memory is that of candidates times references, whatever the pool.

    Returns:
        m times the row and what it adds.
    """
    rng = np.random.default_rng(seed)
    n = len(pool_ND)
    references = pool_ND[rng.permutation(n)[:REFERENCES]]
    n_seen = min(n, math.ceil(n / m * math.log(1 / MISSED)))
    covered = np.zeros(len(references), dtype=np.float32)
    free = rng.permutation(n)
    chosen: list[tuple[int, float]] = []
    for _ in range(m):
        places = rng.choice(len(free), size=min(n_seen, len(free)), replace=False)
        candidates = free[places]
        gains = np.zeros(len(candidates))
        for begin in range(0, len(candidates), REFERENCES):
            part = slice(begin, begin + REFERENCES)
            near = (1 + pool_ND[candidates[part]] @ references.T) / 2
            gains[part] = (1 - weight) * np.maximum(near - covered, 0).mean(axis=1)
        if likeness_N is not None:
            gains += weight * likeness_N[candidates] / m
        best = int(np.argmax(gains))
        row = int(candidates[best])
        covered = np.maximum(covered, (1 + references @ pool_ND[row]) / 2)
        free[places[best]] = free[-1]
        free = free[:-1]
        chosen.append((row, float(gains[best])))
    return chosen


def _index(pool: Array) -> "faiss.IndexFlatIP":
    import faiss

    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(np.ascontiguousarray(pool))
    return index


def _grouped(files: Sequence[int]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(files):
        rows.setdefault(number, []).append(row)
    return rows


def _round(
    queues: Sequence[Iterator[tuple[int, float]]],
) -> Iterator[tuple[int, Iterator[tuple[int, float]]]]:
    while True:
        yield from enumerate(queues)


def _wishes(
    index: "faiss.IndexFlatIP", query: Array, m: int, n_queries: int
) -> Iterator[tuple[int, float]]:
    """Yield all pool rows from the nearest on; the search goes deeper as it is asked."""
    depth, seen = min(index.ntotal, 2 * m // n_queries + 32), 0
    while seen < index.ntotal:
        scores, rows = index.search(np.ascontiguousarray(query), depth)
        for place in range(seen, depth):
            yield int(rows[0, place]), float(scores[0, place])
        seen, depth = depth, min(index.ntotal, 4 * depth)
