"""Opening data files, compressed or not, and reading them within bounds.

A gzip file of some megabytes may hold a line that fills any memory.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from d2lora.data.rows import GZIP
from d2lora.errors import DataError

LONGEST_LINE = 2**26
"""Characters of a line, and of a field of a table, at most."""
MOST_AT_ONCE = 2**30
"""Characters of a file that is read as a whole, at most."""


def opened(path: Path, newline: str | None = None) -> TextIO:
    """Open a UTF-8 text file, with or without a byte-order mark; `.gz` is decompressed."""
    if path.suffix.lower() == GZIP:
        return cast("TextIO", gzip.open(path, "rt", encoding="utf-8-sig", newline=newline))
    return path.open(encoding="utf-8-sig", newline=newline)


def opened_bytes(path: Path) -> BinaryIO:
    """Open a file for its bytes; `.gz` is decompressed."""
    if path.suffix.lower() == GZIP:
        return cast("BinaryIO", gzip.open(path))
    return path.open("rb")


def lines_of(file: TextIO, path: Path) -> Iterator[str]:
    """Read lines one by one, each with its end.

    Raises:
        DataError: If one is longer than any row is.
    """
    number = 1
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            raise DataError(
                f"{path}, line {number}: longer than {LONGEST_LINE:,} characters; expected a row a "
                "line"
            )
        yield line
        number += 1


def whole_text(file: TextIO, path: Path) -> str:
    """Read a file as a whole.

    Raises:
        DataError: If it is larger than what should be read so.
    """
    try:
        text = file.read(MOST_AT_ONCE + 1)
    except MemoryError:
        much = "more than there is memory for"
    else:
        if len(text) <= MOST_AT_ONCE:
            return text
        much = f"more than {MOST_AT_ONCE:,} characters"
    raise DataError(
        f"{path}: {much}, and a JSON file is read as a whole; write its rows one a line in a "
        ".jsonl file"
    )
