"""Reading raw rows from files of every kind: JSON Lines, JSON, CSV, TSV, Parquet, lines of text.

All but Parquet may be compressed by gzip (`.jsonl.gz`).

A row that cannot be read is a `Fault` beside the others; what spoils a whole file is a `DataError`.
"""

import csv
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from d2lora.data.json_rows import read_json, read_json_lines
from d2lora.data.opening import LONGEST_LINE, lines_of, opened, opened_bytes
from d2lora.data.rows import GZIP, Fault, Row, kind_of, readable, repeated, with_nulls
from d2lora.errors import DataError

_PARQUET_ROWS = 4096
_LFS = b"version https://git-lfs.github.com/spec/"

csv.field_size_limit(LONGEST_LINE)  # a field may be a whole document


def file_items(path: Path, header: Sequence[str] = ()) -> Iterator[Row | Fault]:
    """Read the rows and faults of a file, by its suffix.

    Args:
        path: The file.
        header: Names of the columns of a CSV or TSV file without a header.

    Raises:
        DataError: If it is unreadable as a whole.
    """
    with _readable(path):
        _refuse_pointer(path)
        if path.suffix.lower() == GZIP and kind_of(path) == ".parquet":
            raise DataError(f"{path}: Parquet is compressed by itself; run `gunzip` on it")
        if header and kind_of(path) in TABLES:
            yield from TABLES[kind_of(path)](path, header)
        else:
            yield from READERS[kind_of(path)](path)


def text_lines(path: Path) -> Iterator[str]:
    r"""Read the lines of a text file, which end at \n or \r\n and nowhere else.

    Raises:
        DataError: If it cannot be read, is not UTF-8, or has line ends of another kind.
    """
    with _readable(path), opened(path, "\n") as file:
        _refuse_pointer(path)
        for number, line in enumerate(lines_of(file, path), 1):
            text = line.removesuffix("\n").removesuffix("\r")
            if number == 1 and "\r" in text:
                raise DataError(
                    f"{path}, line 1: a carriage return without a newline; write line ends as LF "
                    r"or CRLF, as in `tr '\r' '\n'`"
                )
            yield text


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise DataError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull`")


@contextmanager
def _readable(path: Path) -> Generator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(_not_utf8(path)) from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is cut or damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _not_utf8(path: Path) -> str:
    """Return a message on where a file stops being UTF-8."""
    before = 0
    with _readable(path), opened_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                found, byte = line[error.start], before + error.start + 1
                utf16 = before == 0 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
                kind = "UTF-16" if utf16 else "WINDOWS-1252"
                return (
                    f"{path}, line {number}: not UTF-8 text: byte {byte:,} of the file is "
                    f"0x{found:02x}; convert it, as in `iconv -f {kind} -t UTF-8 {path.name}`"
                )
            before += len(line)
    return f"{path}: not UTF-8 text; convert it"


Record = tuple[int, list[str] | str]
"""A line number with the fields that start there, or with what is wrong."""


def _csv(path: Path, header: Sequence[str] = ()) -> Iterator[Row | Fault]:
    with opened(path, "") as file:
        yield from _table(path, _csv_records(lines_of(file, path)), header)


def _csv_records(lines: Iterable[str]) -> Iterator[Record]:
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "end of data" in str(error)
            fault = "a quote that opens here is never closed" if unclosed else f"not CSV: {error}"
            yield line, fault
        else:
            if fields:
                yield line, fields


def _tsv(path: Path, header: Sequence[str] = ()) -> Iterator[Row | Fault]:
    """Read lines of fields between tabs; a quote is a character like any other."""
    lines = enumerate(text_lines(path), 1)
    records = ((number, line.split("\t")) for number, line in lines if line)
    return _table(path, records, header)


def _table(path: Path, records: Iterator[Record], header: Sequence[str]) -> Iterator[Row | Fault]:
    line, first = (0, list(header)) if header else next(records, (1, list[str]()))
    if isinstance(first, str):
        raise DataError(f"{path}, line {line}: {first}")
    if kind_of(path) == ".csv" and not header and len(first) == 1 and ";" in first[0]:
        raise DataError(
            f"{path}: its fields stand between semicolons; write it with commas, or with tabs as a "
            ".tsv file"
        )
    names = [name or f"column {number}" for number, name in enumerate(first, 1)]
    if twice := repeated(names):
        raise DataError(f"{path}: the header names {twice} more than once; rename or drop columns")
    for line, fields in records:
        if isinstance(fields, str):
            yield Fault(str(path), line, fields, "")
        elif len(fields) != len(names):
            expected = f"expected {len(names)} fields ({', '.join(names)})"
            yield Fault(str(path), line, f"{expected}, found {len(fields)}", str(fields))
        elif header and [field.strip() for field in fields] == names:
            reason = "a header, as the task card's `header` has it; leave that out of the card"
            yield Fault(str(path), line, reason, str(fields))
        else:
            yield Row(dict(zip(names, fields, strict=True)), str(path), line)


def _check_columns(path: Path, names: Iterable[str]) -> None:
    if twice := repeated(names):
        raise DataError(f"{path}: {twice} names more than one column; rename or drop columns")


def _parquet(path: Path) -> Iterator[Row | Fault]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        values = (row for batch in file.iter_batches(_PARQUET_ROWS) for row in batch.to_pylist())
        for number, row in enumerate(values, 1):
            yield readable(Row(with_nulls(row), str(path), number))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from None
    except OverflowError as error:
        raise DataError(f"{path}: a date in it is out of Python's range: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text in it is not UTF-8: {error}") from None
    except LookupError as error:
        raise DataError(f"{path}: a time zone in it is not known: {error}") from None
    except DataError:
        raise
    except ValueError as error:  # such as two fields of one name inside of a column
        raise DataError(f"{path}: a value in it cannot be read: {error}") from None


TABLES = {".csv": _csv, ".tsv": _tsv}
READERS: dict[str, Callable[[Path], Iterator[Row | Fault]]] = {
    ".jsonl": read_json_lines, ".ndjson": read_json_lines, ".json": read_json,
    ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet,
}  # fmt: skip
