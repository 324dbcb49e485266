"""What several tests share."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("D2LORA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))

# In CI the data sets have to be there: a test that cannot find them fails instead of being skipped.
needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir() and not os.environ.get("CI"),
    reason="needs the public data sets in ../shared/data",
)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSONL; return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSONL rows."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
