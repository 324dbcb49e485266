"""Opening data files, compressed or not."""

import gzip
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from d2lora.data.rows import GZIP


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
