"""A pool of rows that need not fit in memory: on disk, each read again when it is used.

Whatever the kind of its sources, a pool is written row by row to a temporary file without a name,
which is gone when the process ends, however it ends. Memory holds where each row starts.
"""

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import IO, TypeVar, overload

from d2lora.data.reading import Reading, Say, TaskData
from d2lora.data.rows import Example, place
from d2lora.data.sources import Row

T_co = TypeVar("T_co", covariant=True)


class Lazy(Sequence[T_co]):
    """A sequence whose items are found by a key when they are asked for, and not kept."""

    def __init__(self, find: Callable[[int], T_co], keys: Sequence[int]) -> None:
        """Hold the keys.

        Args:
            find: Returns the item of a key.
            keys: The key of each place.
        """
        self._find, self._keys = find, keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, place: int) -> T_co: ...
    @overload
    def __getitem__(self, place: slice) -> list[T_co]: ...
    def __getitem__(self, place: int | slice) -> T_co | list[T_co]:
        if isinstance(place, slice):
            return [self._find(key) for key in self._keys[place]]
        return self._find(self._keys[place])


class _Spool:
    """Rows on disk, written once and read by their place."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives with the pool
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])
        self._lock = Lock()

    def add(self, row: Row) -> None:
        line = json.dumps([row.values, row.file, row.line], default=str, separators=(",", ":"))
        self._ends.append(self._ends[-1] + self._file.write(line.encode()))

    def flush(self) -> None:
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> Row:
        begin, end = self._ends[place], self._ends[place + 1]
        return Row(*json.loads(self._read(end - begin, begin)))

    def _read(self, n_bytes: int, begin: int) -> bytes:
        if hasattr(os, "pread"):  # processes that share the file do not move each other's place
            return os.pread(self._file.fileno(), n_bytes, begin)
        with self._lock:  # Windows
            self._file.seek(begin)
            return self._file.read(n_bytes)


def read_pool(names: Sequence[str], task_name: str = "auto", say: Say | None = None) -> TaskData:
    """Read sources as a pool whose rows and examples stay on disk; bad rows are its `faults`.

    Args:
        names: Files or hub data sets.
        task_name: As for `tasks.task_of`.
        say: As for `tasks.Reading`.

    Raises:
        DataError: If a source cannot be read, or no row is good.
    """
    reading, spool = Reading(names, task_name, say), _Spool()
    for row, _ in reading:
        spool.add(row)
    spool.flush()

    def example_of(number: int) -> Example:
        assert reading.task is not None
        row = spool[number]
        where = place(row.file, row.line)
        return replace(reading.task.read(row.values), row=number, place=where)

    places = range(len(spool))
    rows = Lazy(spool.__getitem__, places)
    return reading.data(Lazy(example_of, places), rows, skip_bad=True)
