"""A pool of rows that need not fit in memory: on disk, each read again when it is looked at.

Whatever the kind of its sources, a pool is written row by row to a temporary file without a name,
which is gone when the process ends, however it ends. Memory holds where each row begins.
"""

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO, Any, TypeVar, overload

from d2lora.data import Fault, Row, stream_source
from d2lora.rows import BadRowError, Example
from d2lora.tasks import TaskData, bad_row, check_faults, task_of

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
    """Rows on disk: the number of the source, the line and the values of each."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives with the pool
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])

    def add(self, source: int, row: Row) -> None:
        line = json.dumps([source, row.line, row.values], default=str, separators=(",", ":"))
        self._ends.append(self._ends[-1] + self._file.write(line.encode()))

    def flush(self) -> None:
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> tuple[int, int, dict[str, Any]]:
        begin, end = self._ends[place], self._ends[place + 1]
        source, line, values = json.loads(os.pread(self._file.fileno(), end - begin, begin))
        return source, line, values


def read_pool(names: Sequence[str], task_name: str = "auto") -> TaskData:
    """Read sources as a pool whose rows and examples stay on disk; bad rows are its `faults`.

    Args:
        names: Files or hub data sets.
        task_name: A name of `tasks.TASKS`, or `auto`.

    Raises:
        DataError: If a source cannot be read, or no row is good.
    """
    spool = _Spool()
    manifests: list[dict[str, Any]] = []
    faults: list[Fault] = []
    task = None
    for number, name in enumerate(names):
        stream = stream_source(name)
        n_rows = 0
        for item in stream.items:
            if isinstance(item, Fault):
                faults.append(item)
                continue
            n_rows += 1
            task = task or task_of(task_name, item.values)
            try:
                task.read(item.values)
            except BadRowError as error:
                faults.append(bad_row(item, error))
            else:
                spool.add(number, item)
        manifests.append({"file": stream.name, "rows": n_rows, "sha256": stream.fingerprint()})
    spool.flush()
    check_faults(faults, len(spool), skip_bad=True)
    assert task is not None
    read, files = task.read, [manifest["file"] for manifest in manifests]

    def row_of(place: int) -> Row:
        source, line, values = spool[place]
        return Row(values, files[source], line)

    def example_of(place: int) -> Example:
        return replace(read(row_of(place).values), row=place)

    places = range(len(spool))
    return TaskData(task, Lazy(example_of, places), Lazy(row_of, places), manifests, faults)
