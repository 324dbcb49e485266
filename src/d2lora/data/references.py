"""Further right answers of a row, as a task card's `references` names them."""

from collections.abc import Mapping, Sequence
from typing import Any

from d2lora.data.paths import as_text, is_answer, value_at
from d2lora.data.rows import BadRowError


def references_of(row: Mapping[str, Any], paths: Sequence[str]) -> tuple[str, ...]:
    """Return the texts that paths lead to; of several paths those that hold something.

    Raises:
        BadRowError: If one leads nowhere, or to what is no text.
    """
    found: list[str] = []
    for path in paths:
        if len(paths) > 1 and row.get(path, path) in (None, ""):
            continue
        value = value_at(row, path)
        texts = value if isinstance(value, list) else [value]
        if not all(map(is_answer, texts)):
            raise BadRowError(f"field `{path}` must be a text or a list of texts, none empty")
        found += map(as_text, texts)
    return tuple(found)
