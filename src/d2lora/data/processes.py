"""Work on each of many rows, in as many processes as there are threads to use."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import current_process
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from d2lora.errors import D2LoraError

T = TypeVar("T")
U = TypeVar("U")

MANY = 5_000
"""Rows from which on several processes are worth their start."""
_CHUNK = 64
"""Rows that a process hands over at once."""


def mapped(make: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
    """Yield what is made of each item, in the order of the items.

    Raises:
        D2LoraError: What `make` raises first.
    """
    n = n_processes(len(items))
    if n < 2:
        yield from map(make, items)
        return
    loader = DataLoader(
        _Made(make, items), _CHUNK, num_workers=n, collate_fn=list, multiprocessing_context="fork",
        generator=torch.Generator(),  # else it draws a number from the global one
    )  # fmt: skip
    for chunk in loader:
        for made in chunk:
            if isinstance(made, D2LoraError):
                raise made
            yield made


def n_processes(n_items: int) -> int:
    """Return how many processes to use: 1 for few items, and where they would not share memory."""
    if n_items < MANY or sys.platform != "linux" or current_process().daemon:
        return 1
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)))


class _Made(Dataset[U | D2LoraError], Generic[T, U]):
    """What is made of items; our own errors are items, too, as the loader changes their message."""

    def __init__(self, make: Callable[[T], U], items: Sequence[T]) -> None:
        self._make, self._items = make, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> U | D2LoraError:
        try:
            return self._make(self._items[index])
        except D2LoraError as error:
            return error
