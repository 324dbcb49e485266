"""Words of a text and hashes of the n-grams of them, the same in every process."""

import unicodedata
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2lora.data.words import words_of

Hashes = NDArray[np.uint64]

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication loses nothing


def words(text: str) -> list[str]:
    """Return the words of a text: compatibility forms folded (NFKC), case and punctuation gone."""
    return words_of(unicodedata.normalize("NFKC", text).casefold())


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))


def word_hashes(words_: list[str]) -> Hashes:
    """Return a 64-bit hash of each word, shape (words,)."""
    return np.fromiter(map(_hash, words_), dtype=np.uint64, count=len(words_))


def gram_hashes(hashes: Hashes, n: int) -> Hashes:
    """Return a hash of each word n-gram, shape (words - n + 1,), or (0,) for fewer words."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * _FACTOR + hashes[offset : offset + count]
    return total


def shingles(text: str, n: int) -> Hashes:
    """Return the distinct n-gram hashes of a text, sorted; a shorter text is one n-gram."""
    hashes = word_hashes(words(text))
    return np.unique(gram_hashes(hashes, min(n, max(1, len(hashes)))))


def overlap(first: Hashes, second: Hashes) -> float:
    """Return the Jaccard similarity of two sets of hashes, each sorted and without repeats."""
    if not len(first) and not len(second):
        return 1.0
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)
