"""Which rows an adapter was trained on, kept beside it, and which test rows are among them.

trained_rows.json   16 hex digits of each row's text, those of the adapter's ancestors too
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from d2lora.adapters.manifest import Manifest, has_manifest
from d2lora.data.contamination import normalized
from d2lora.data.processes import mapped
from d2lora.data.rows import Example
from d2lora.errors import ModelError, counted
from d2lora.runtime.run_folder import write_text

FILE = "trained_rows.json"


class TrainedRows(BaseModel):
    """Rows that were given to a training, or to those before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    """SHA-256 of files of which every row counts, as it is not known which were used."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        """Return the record of training rows."""
        return cls(rows=frozenset(mapped(lambda example: _digest(example.text), examples)))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the record of an adapter or of a base that one was merged into.

        Without one the files that the manifest names count, its ancestors' too.

        Raises:
            ModelError: If it is damaged.
        """
        path = folder / FILE
        if path.is_file():
            try:
                return cls.model_validate_json(path.read_bytes())
            except ValidationError as error:
                raise ModelError(f"{path}: {error.errors()[0]['msg']}; was it cut off?") from None
        if not has_manifest(folder):
            return cls()
        manifest = Manifest.read(folder)
        sources = [*manifest.data, *(s for parent in manifest.lineage for s in parent.data)]
        return cls(files=frozenset(s["sha256"] for s in sources if "sha256" in s))

    def __or__(self, other: Self) -> Self:
        """Return the record of both."""
        return type(self)(rows=self.rows | other.rows, files=self.files | other.files)

    def write(self, folder: Path) -> None:
        """Write the record beside an adapter."""
        record = {"rows": sorted(self.rows), "files": sorted(self.files)}
        write_text(folder / FILE, json.dumps(record))

    def among(self, tests: Iterable["TestRow"]) -> list["TestRow"]:
        """Return the test rows that were trained on."""
        return [
            test
            for test in tests
            if test.sha256 in self.files or any(_digest(text) in self.rows for text in test.texts)
        ]


@dataclass(frozen=True)
class TestRow:
    """A row that adapters are measured on."""

    __test__ = False  # not a class of tests

    use: str
    """`task`, `general_text` or `choices`."""
    file: str
    line: int
    texts: tuple[str, ...]
    """Its text with each right answer."""
    sha256: str
    """Of the file."""


def places(rows: Iterable[TestRow], shown: int = 8) -> list[str]:
    """Return a text for each file: how many rows of it, and which."""
    by_file: dict[str, list[int]] = {}
    for row in rows:
        by_file.setdefault(row.file, []).append(row.line)
    return [
        f"{counted(len(lines), 'row')} of {file} ({', '.join(map(str, lines[:shown]))}"
        f"{', ...' if len(lines) > shown else ''})"
        for file, lines in by_file.items()
    ]


def _digest(text: str) -> str:
    """Return 16 hex digits of a text's words; of a text without words, of the text."""
    content = " ".join(normalized(text)) or text.strip()
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
