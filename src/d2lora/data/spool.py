"""Rows that need not fit in memory: on disk, each read again when it is used."""

import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import IO, Generic, TypeVar, overload

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Lazy(Sequence[T_co]):
    """A sequence whose items are found by a key when they are asked for, and not kept."""

    def __init__(self, find: Callable[[int], T_co], keys: Iterable[int]) -> None:
        """Hold the keys, in eight bytes each.

        Args:
            find: Returns the item of a key.
            keys: The key of each place.
        """
        self._find, self._keys = find, array("q", keys)

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


class Spool(Generic[T]):
    """Items in a temporary file without a name, written once and read by their number.

    The file is gone when the process ends, however it ends. Memory holds where each item starts;
    nothing is mapped, since pages that were read would count as the process's own.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        """Write items, in their order."""
        # Without a buffer, which processes that are forked would write a second time.
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # lives with the spool
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])
        self._lock = Lock()
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        """Write an item behind the others."""
        content = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._file.seek(self._ends[-1])
            self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> T:
        begin, end = self._ends[number], self._ends[number + 1]
        item: T = pickle.loads(self._read(end - begin, begin))  # noqa: S301  # written above
        return item

    def all(self) -> Lazy[T]:
        """Return the items as a sequence."""
        return Lazy(self.__getitem__, range(len(self)))

    def _read(self, n_bytes: int, begin: int) -> bytes:
        if hasattr(os, "pread"):  # processes that share the file do not move each other's place
            return os.pread(self._file.fileno(), n_bytes, begin)
        with self._lock:  # Windows
            self._file.seek(begin)
            return self._file.read(n_bytes)
