"""Answers that are JSON: are they JSON at all, are they equal, which values are right."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from d2lora.errors import DataError, listed
from d2lora.evaluation.counts import Column, f1_counts
from d2lora.evaluation.metrics.metric import Scored, Scores, of_each_row

NOT_JSON = object()
"""What is parsed of a text that is not JSON."""


def json_valid(scored: Scored) -> Scores:
    """Score 1 where the output as a whole is JSON."""
    return {"json_valid": float(parsed(scored.output) is not NOT_JSON)}


def json_match(scored: Sequence[Scored]) -> dict[str, Column]:
    """Score 1 where output and target are equal as JSON; the order of names is free, 1 is 1.0.

    Raises:
        DataError: If right answers are not JSON.
    """
    _check(scored, _canonical, "json_match", "JSON")

    def equal(row: Scored) -> Scores:
        output = _canonical(row.output)
        return {"json_match": float(output in map(_canonical, row.references))}

    return of_each_row(equal)(scored)


def slot_f1(scored: Sequence[Scored]) -> dict[str, Column]:
    """Score names with their values in JSON objects: F1 over all rows together.

    An output that is no object has none of them. Of several references the nearest counts.

    Raises:
        DataError: If right answers are not JSON objects.
    """
    _check(scored, _slots, "slot_f1", "a JSON object")
    found = [_slots(row.output) or set[str]() for row in scored]
    wanted: list[set[str]] = []
    for own, row in zip(found, scored, strict=True):
        references = [_slots(text) or set[str]() for text in row.references]
        wanted.append(max(references, key=lambda slots: _overlap(own, slots)))
    return {"slot_f1": f1_counts(found, wanted)}


def parsed(text: str) -> Any:
    """Return the value of a JSON text, or `NOT_JSON`; numbers that are whole are integers."""
    try:
        return json.loads(text, parse_float=_number, parse_constant=_refuse)
    except (ValueError, RecursionError):  # not JSON, or nested deeper than Python reads it
        return NOT_JSON


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not in JSON")


def _canonical(text: str) -> str | None:
    """Return the one way to write what a JSON text says; None if it is not JSON."""
    value = parsed(text)
    return None if value is NOT_JSON else json.dumps(value, sort_keys=True)


def _slots(text: str) -> set[str] | None:
    """Return the pairs of name and value of a JSON object, each in its one way to be written.

    The pairs of objects inside it are its own, by the names that lead to them.
    """
    value = parsed(text)
    return set(_pairs(value, ())) if isinstance(value, dict) else None


def _pairs(value: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    for name, one in value.items():
        if isinstance(one, dict) and one:
            yield from _pairs(one, (*path, name))
        else:
            yield json.dumps([*path, name, one], sort_keys=True)


def _overlap(found: set[str], wanted: set[str]) -> float:
    return len(found & wanted) / max(1, len(found) + len(wanted))


def _check(scored: Sequence[Scored], read: Callable[[str], Any], metric: str, what: str) -> None:
    faults = [
        f"test row {number}: {reference!r:.60}"
        for number, row in enumerate(scored, 1)
        for reference in row.references
        if read(reference) is None
    ]
    if faults:
        raise DataError(f"{metric}: every right answer has to be {what}:\n{listed(faults)}")
