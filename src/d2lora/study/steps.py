"""Steps towards a result that others have to be computed for: they return what is missing.

    warm_up = yield from needs.warm_up("general")    within steps: go on once it is there
    found = reached(needs.result(cell))              from outside: the result, or `Missing`

Steps that are asked again start from the beginning, and find in the store what is there by then.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from d2lora.study.store import Job

T = TypeVar("T")
Steps = Generator[Sequence[Job], None, T]
"""Lead to a `T`; yield the jobs that have to be run before they can go on."""


@dataclass(frozen=True)
class Missing:
    """Jobs that have to be run first, independent of each other."""

    jobs: Sequence[Job]


class CellFailedError(Exception):
    """A job that a cell needs has failed; the text is the reason."""


def reached(steps: Steps[T]) -> T | Missing:
    """Return what steps lead to, or the jobs that are missing on the way."""
    try:
        return Missing(next(steps))
    except StopIteration as end:
        return end.value
