"""Reading rows from files and data sets, choosing subsets that nest, fingerprints of data.

A source is a file (`files.READERS`), a hub data set written `owner/name:split` or
`owner/name/config:split`, or a folder of one, `FOLDER:split`. Rows come back raw, each with the
place where it stands; `tasks` gives them meaning.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2lora.data.files import READERS, file_items
from d2lora.data.paths import column_of, rows_within
from d2lora.data.rows import (
    PLAIN,
    BadRowError,
    Fault,
    Layout,
    Row,
    is_lined,
    kind_of,
    readable,
    repeated,
    with_nulls,
)
from d2lora.data.sets import folder_of, of_hub, rows_of_set
from d2lora.errors import DataError
from d2lora.runtime.run_folder import read_json, sha256_of, write_text

BAD_ROWS = "bad_rows.jsonl"
SELECTED, SELECTION_CARD = "data.jsonl", "card.json"
"""What `d2lora select` writes: the chosen rows and how they were chosen."""


def write_bad_rows(faults: Sequence[Fault], folder: Path) -> None:
    """Write bad rows that were skipped into a folder; no file where there are none."""
    if faults:
        write_text(folder / BAD_ROWS, fault_lines(faults))


def fault_lines(faults: Iterable[Fault]) -> str:
    """Return bad rows as JSON lines, each with its reason."""
    rows = ({"file": f.file, "line": f.line, "reason": f.reason, "row": f.text} for f in faults)
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass(frozen=True)
class Source:
    """The rows of one source with the faults met and the fingerprint of the whole."""

    name: str
    rows: list[Row]
    faults: list[Fault]
    sha256: str

    def manifest(self) -> dict[str, Any]:
        """Return the manifest's record of this source."""
        return {"file": self.name, "rows": len(self.rows), "sha256": self.sha256}


def is_local(name: str) -> bool:
    """Say whether a source is a file or folder that is here, which is read without asking a hub."""
    if kind_of(Path(name)) in READERS:
        return Path(name).is_file()
    return folder_of(name) is not None


def is_remote(name: str) -> bool:
    """Say whether a source is a hub data set: it is no file, and does not look like one."""
    path = Path(name)
    here = path.exists() or folder_of(name) is not None
    return kind_of(path) not in READERS and not here and of_hub(name)


def check_different(names: Iterable[str]) -> None:
    """Check that no source is named twice, be it by another path: its rows would count twice.

    Raises:
        DataError: If one is.
    """
    if twice := repeated(map(_path_of, names)):
        raise DataError(f"{twice} is given more than once, so its rows would count twice")


def _path_of(name: str) -> str:
    if folder := folder_of(name):
        return f"{os.path.realpath(folder.path)}:{folder.split}"
    return os.path.realpath(name) if is_local(name) else name


@dataclass(frozen=True)
class Stream:
    """The rows and faults of one source, as an iterator to use once."""

    name: str
    items: Iterator[Row | Fault]
    fingerprint: Callable[[], str]
    """SHA-256 of the source; to be asked when the items are through."""


def read_source(name: str, layout: Layout = PLAIN) -> Source:
    """Read one source.

    Args:
        name: As for `stream_source`.
        layout: As for `stream_source`.

    Raises:
        DataError: As `stream_source`.
    """
    stream = stream_source(name, layout)
    rows: list[Row] = []
    faults: list[Fault] = []
    for item in stream.items:
        if isinstance(item, Row):
            rows.append(item)
        else:
            faults.append(item)
    return Source(stream.name, rows, faults, stream.fingerprint())


def stream_source(name: str, layout: Layout = PLAIN) -> Stream:
    """Open one source; JSON Lines, CSV, Parquet and hub data are never in memory as a whole.

    Args:
        name: A file, a hub data set or a folder of one.
        layout: How rows lie in it.

    Raises:
        DataError: If the file is missing, of an unknown kind, unreadable or holds no rows; what
            only shows in reading is raised there.
    """
    path = Path(name)
    if kind_of(path) in READERS:
        if not path.is_file():
            found = "a folder, not a file" if path.is_dir() else "no such file"
            raise DataError(f"{name}: {found}")
        items = _within(file_items(path, layout.header), layout.rows)
        return Stream(str(path), _some(name, items), lambda: sha256_of(path))
    if name and path.exists() and folder_of(name) is None:
        kinds = ", ".join(READERS)
        raise DataError(f"{name}: expected a file of kind {kinds}, found {path.suffix or 'none'}")
    digest = hashlib.sha256()
    items = _within(_set_items(name, digest.update), layout.rows)
    return Stream(name, _some(name, items), digest.hexdigest)


def _within(items: Iterable[Row | Fault], path: str) -> Iterator[Row | Fault]:
    """Yield the rows that a path leads to, counted over the whole source; none: as they are.

    What does not have the path's first field is a row itself, as what a study leaves of a file is.
    """
    if not path:
        yield from items
        return
    first, number = column_of(path), 0
    for item in items:
        whole = isinstance(item, Row) and first not in item.values
        if isinstance(item, Fault) or (whole and is_lined(item.file)):
            yield item
        elif is_lined(item.file):
            yield item.fault(
                f"`rows: {path}` of the card leads into it, but a line holds one row: write the "
                "file as a JSON list"
            )
        else:
            try:
                found = [item.values] if whole else rows_within(item.values, path)
            except BadRowError as error:
                yield item.fault(error)
                continue
            yield from (Row(values, item.file, number + i) for i, values in enumerate(found, 1))
            number += len(found)


def _some(name: str, items: Iterable[Row | Fault]) -> Iterator[Row | Fault]:
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise DataError(f"{name}: the file holds no rows")


def _set_items(name: str, digested: Callable[[bytes], None]) -> Iterator[Row | Fault]:
    for number, row in enumerate(rows_of_set(name), 1):
        values = with_nulls(dict(row))
        digested(json.dumps(values, sort_keys=True, default=str).encode())
        yield readable(Row(values, name, number))


def nested_order(n_rows: int, seed: int) -> list[int]:
    """Return a seeded permutation of row indices.

    The first n of it are the subset of size n, so subsets of one seed nest: the 16 are inside
    the 64.
    """
    return np.random.default_rng(seed).permutation(n_rows).tolist()


def split_validation(
    indices: Sequence[int], fraction: float, fold: tuple[int, int] | None = None
) -> tuple[list[int], list[int]]:
    """Split chosen rows into training and validation rows; the last `fraction` validate.

    At least one row validates where `fraction` > 0, and at least one trains. A `fold` (i, k) takes
    the place of the fraction: the i-th of k parts, as equal as can be, validates.
    """
    n = len(indices)
    if n < 2 or (fraction == 0 and fold is None):
        return list(indices), []
    if fold is None:
        begin, end = n - min(max(1, round(n * fraction)), n - 1), n
    else:
        number, n_folds = fold
        begin, end = n * number // n_folds, n * (number + 1) // n_folds
    return [*indices[:begin], *indices[end:]], list(indices[begin:end])


def selection_behind(file: str) -> str | None:
    """Return how the rows of a data file were selected, where `select` wrote it; else None."""
    path = Path(file)
    if path.name != SELECTED or not (path.parent / SELECTION_CARD).is_file():
        return None
    card = read_json(path.parent / SELECTION_CARD)
    task = f" for {' '.join(card['for_task'])}" if card["for_task"] else ""
    pool = " ".join(source["file"] for source in card["pool"])
    return (
        f"{card['m']:,} rows selected by {card['method']}{task} from {card['n_clean']:,} of {pool}"
    )
