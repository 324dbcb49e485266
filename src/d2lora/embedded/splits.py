"""Splits that cannot overlap: where a text belongs follows from the text itself."""

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

Split = Literal["train", "valid", "test"]
Row = TypeVar("Row")


def split_of(text: str) -> Split:
    """Return the split of a text: 80 % train, 10 % valid, 10 % test, by its hash."""
    normal = " ".join(text.lower().split())
    bucket = int.from_bytes(hashlib.sha256(normal.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else "valid" if bucket == 8 else "test"


def chance_for(*names: object) -> random.Random:
    """Return a random stream of its own for these names; the same in every process."""
    return random.Random("/".join(str(name) for name in names))


def distinct(
    make: Callable[[], Row], key: Callable[[Row], str], split: Split, patience: int = 2000
) -> Iterator[Row]:
    """Yield rows of one split, none twice, until `patience` tries in a row give no new one."""
    seen: set[str] = set()
    failures = 0
    while failures < patience:
        row = make()
        text = key(row)
        if split_of(text) == split and text not in seen:
            seen.add(text)
            failures = 0
            yield row
        else:
            failures += 1
