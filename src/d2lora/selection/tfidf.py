"""Texts as bags of hashed words: counts, tf-idf weights, and vectors of few numbers from them.

The one door to scikit-learn. Rows are sparse, so memory grows with the words of a text alone.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2lora.data.words import pieces_of

Array = NDArray[np.float32]
Bags = Any  # a scipy sparse matrix, shape (texts, buckets)
_BUCKETS = 1 << 16
_FIT_ROWS, _BLOCK_ROWS = 20_000, 4096


def count_bags(texts: Sequence[str], n_buckets: int = _BUCKETS, longest_gram: int = 1) -> Bags:
    """Count the hashed words, and word n-grams up to `longest_gram`, of each text."""
    from sklearn.feature_extraction.text import HashingVectorizer

    options: dict[str, Any] = {
        "n_features": n_buckets, "ngram_range": (1, longest_gram), "alternate_sign": False,
        "norm": None, "dtype": np.float32, "preprocessor": _folded, "tokenizer": pieces_of,
        "token_pattern": None,
    }  # fmt: skip
    return HashingVectorizer(**options).transform(texts or [""])[: len(texts)]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.lower())


def bags_in_blocks(texts: Sequence[str], n_buckets: int, longest_gram: int) -> Iterator[Bags]:
    """Count as `count_bags` does, some thousand texts at a time."""
    for begin in range(0, len(texts), _BLOCK_ROWS):
        yield count_bags(texts[begin : begin + _BLOCK_ROWS], n_buckets, longest_gram)


def weighted_bags(pool: Bags, other: Bags) -> tuple[Bags, Bags]:
    """Weigh counts by `(1 + log tf) log(n / df)` with the pool's df; each row has length 1.

    Unlike scikit-learn's own, the weight of a word that every text has is zero.
    """
    from sklearn.preprocessing import normalize

    n_texts_with = np.bincount(pool.indices, minlength=pool.shape[1])
    rarity = np.log((1 + pool.shape[0]) / (1 + n_texts_with)).astype(np.float32)
    weighted: list[Bags] = []
    for bags in (pool, other):
        found = bags.copy()
        found.data = (1 + np.log(found.data)) * rarity[found.indices]
        weighted.append(normalize(found) if found.shape[0] else found)
    return weighted[0], weighted[1]


def dense_product(first: Bags, second: Bags) -> Array:
    """Return the inner products of the rows of two bags, shape (rows, rows)."""
    return np.asarray((first @ second.T).todense())


def semantic_vectors(
    pool_texts: Sequence[str], other_texts: Sequence[str], width: int, seed: int
) -> tuple[Array, Array]:
    """Return vectors by latent semantic analysis (Deerwester et al. 1990), `width` numbers each.

    The analysis is fitted on at most 20,000 pool rows.
    """
    from sklearn.decomposition import TruncatedSVD

    pool, other = weighted_bags(count_bags(pool_texts), count_bags(other_texts))
    rows = np.random.default_rng(seed).permutation(len(pool_texts))[:_FIT_ROWS]
    reduce = TruncatedSVD(min(width, len(rows)), random_state=seed).fit(pool[rows])
    found = reduce.transform(pool)
    others = reduce.transform(other) if len(other_texts) else found[:0]
    return found.astype(np.float32), others.astype(np.float32)
