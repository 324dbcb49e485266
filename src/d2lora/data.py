"""Reading rows from files and hub data sets, choosing subsets that nest, fingerprints of data.

A source is a file (.jsonl, .json, .csv, .tsv, .parquet) or a hub data set written
`owner/name:split` or `owner/name/config:split`. Rows come back raw, each with the place where it
stands; `tasks` gives them meaning.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2lora.errors import DataError
from d2lora.runs import sha256_of

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PARQUET_ROWS = 4096


@dataclass(frozen=True)
class Row:
    """A raw row; `line` is its line in the file (for Parquet and hub data its row), from 1."""

    values: dict[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used, why, and its text."""

    file: str
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


def fault_lines(faults: Iterable[Fault]) -> str:
    """Return rows that were set aside as JSON lines, with what is the matter with each."""
    told = ({"file": f.file, "line": f.line, "reason": f.reason, "row": f.text} for f in faults)
    return "".join(json.dumps(row) + "\n" for row in told)


@dataclass(frozen=True)
class Source:
    """The rows of one source with the faults met and the fingerprint of the whole."""

    name: str
    rows: list[Row]
    faults: list[Fault]
    sha256: str

    def manifest(self) -> dict[str, Any]:
        """Return what a manifest says of this source."""
        return {"file": self.name, "rows": len(self.rows), "sha256": self.sha256}


def is_local(name: str) -> bool:
    """Say whether a source is a file that is here, which is read without asking a hub."""
    return Path(name).suffix in SUFFIXES and Path(name).is_file()


@dataclass(frozen=True)
class Stream:
    """The rows and faults of one source, one after the other, to be gone through once."""

    name: str
    items: Iterator[Row | Fault]
    fingerprint: Callable[[], str]
    """SHA-256 of the source; to be asked when the items are through."""


def read_source(name: str) -> Source:
    """Read one source.

    Raises:
        DataError: As `stream_source`.
    """
    stream = stream_source(name)
    rows: list[Row] = []
    faults: list[Fault] = []
    for item in stream.items:
        if isinstance(item, Row):
            rows.append(item)
        else:
            faults.append(item)
    return Source(stream.name, rows, faults, stream.fingerprint())


def stream_source(name: str) -> Stream:
    """Open one source; JSON Lines, CSV, Parquet and hub data are never in memory as a whole.

    Raises:
        DataError: If the file is missing, of an unknown kind, unreadable or holds no rows; what
            only shows in reading is raised there.
    """
    path = Path(name)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"{name}: no such file")
        return Stream(str(path), _some(name, _file_items(path)), lambda: sha256_of(path))
    if path.exists():
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{name}: expected a file of kind {kinds}, found {path.suffix or 'none'}")
    digest = hashlib.sha256()
    return Stream(name, _some(name, _hub_items(name, digest.update)), digest.hexdigest)


def _some(name: str, items: Iterable[Row | Fault]) -> Iterator[Row | Fault]:
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise DataError(f"{name}: the file holds no rows")


def _file_items(path: Path) -> Iterator[Row | Fault]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}; convert it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _jsonl(path: Path) -> Iterator[Row | Fault]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if text:
                yield _parsed(str(path), number, text)


def _parsed(file: str, line: int, text: str) -> Row | Fault:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return Fault(file, line, f"not JSON: {error.msg} at column {error.colno}", text)
    if not isinstance(value, dict):
        return Fault(file, line, f"expected an object, found {type(value).__name__}", text)
    return Row(value, file, line)


def _json(path: Path) -> Iterator[Row | Fault]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: not JSON: {error.msg} at {place}") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of rows, found {type(value).__name__}")
    for number, row in enumerate(value, 1):
        if isinstance(row, dict):
            yield Row(row, str(path), number)
        else:
            reason = f"expected an object, found {type(row).__name__}"
            yield Fault(str(path), number, reason, json.dumps(row))


def _csv(path: Path) -> Iterator[Row | Fault]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = reader.fieldnames or []
        for row in reader:
            if None in row or None in row.values():
                reason = f"expected {len(names)} fields ({', '.join(names)}), found another number"
                yield Fault(str(path), reader.line_num, reason, str(list(row.values())))
            else:
                yield Row(dict(row), str(path), reader.line_num)


def _parquet(path: Path) -> Iterator[Row | Fault]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(_PARQUET_ROWS)
        values = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(values, 1):
            yield Row(row, str(path), number)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from None


def _hub_items(name: str, digested: Callable[[bytes], None]) -> Iterator[Row]:
    repository, _, split = name.partition(":")
    parts = repository.split("/")
    if len(parts) not in (2, 3) or not all(parts) or name.startswith((".", "/")):
        raise DataError(
            f"{name}: no such file, and not a hub data set (`owner/name:split` or "
            "`owner/name/config:split`)"
        )
    from datasets import exceptions, load_dataset

    config = parts[2] if len(parts) == 3 else None
    try:
        loaded = load_dataset("/".join(parts[:2]), config, split=split or "train")
    except (exceptions.DatasetsError, ConnectionError, FileNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: the hub data set cannot be loaded: {reason}") from None
    for number, row in enumerate(loaded, 1):
        values = dict(row)
        digested(json.dumps(values, sort_keys=True, default=str).encode())
        yield Row(values, name, number)


def nested_order(n_rows: int, seed: int) -> list[int]:
    """Return a seeded permutation of row indices.

    The first n of it are the subset of size n, so subsets of one seed nest: the 16 are inside
    the 64.
    """
    return np.random.default_rng(seed).permutation(n_rows).tolist()


def stream_seed(root: int, stream: str) -> int:
    """Return the seed of one named source of randomness, split off the root seed."""
    digest = hashlib.sha256(f"{root}/{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


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
