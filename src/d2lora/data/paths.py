"""Values inside a row by their path: `QUESTION`, `meta.id`, `answers[0].text`, `CONTEXTS[*]`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from d2lora.data.rows import BadRowError, fields_of

_STEP = re.compile(r"\[(?P<place>\*|-?\d+)\]|\.?(?P<name>[^.\[\]]+)")

EVERY = "[*]"


def steps_of(path: str) -> list[str | int]:
    """Return the steps of a path: names, places from 0 (negative: from the end), and `EVERY`.

    Raises:
        ValueError: If it is not a path.
    """
    steps: list[str | int] = []
    at = 0
    while at < len(path):
        found = _STEP.match(path, at)
        if found is None or (at == 0 and (found["name"] is None or path[0] == ".")):
            raise ValueError(
                f"{path!r} is not a path to a field: write `name`, `name.inner`, `name[0]` or "
                "`name[*]`"
            )
        place = found["place"]
        steps.append(found["name"] if place is None else EVERY if place == "*" else int(place))
        at = found.end()
    if not steps:
        raise ValueError("an empty path names no field")
    return steps


def rows_within(row: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    """Return the rows that a path leads to, each with the fields around it.

    Of `{"title": t, "qas": [{"q": 1}, {"q": 2}]}` those at `qas[*]` are `{"title": t, "q": 1}` and
    `{"title": t, "q": 2}`. An inner field counts before one of the same name around it.

    Raises:
        BadRowError: If there is no such list of objects.
    """
    found: list[tuple[dict[str, Any], Any]] = [({}, row)]
    gone = ""
    for step in steps_of(path):
        inner: list[tuple[dict[str, Any], Any]] = []
        for around, value in found:
            if step == EVERY:
                if not isinstance(value, list):
                    raise BadRowError(f"`{gone}` must be a list of rows, found {_kind([value])}")
                inner += [(around, item) for item in value]
            else:
                own = _step(value, step, path, gone)
                others = {name: other for name, other in value.items() if name != step}
                inner.append(({**around, **others}, own))
        found, gone = inner, f"{gone}{step}" if step == EVERY else f"{gone}.{step}".strip(".")
    for _, value in found:
        if not isinstance(value, Mapping):
            raise BadRowError(f"`{gone}` must hold objects, found {_kind([value])}")
    return [{**around, **value} for around, value in found]


class Items(list[Any]):
    """What `[*]` leads to; as a text it has an item a line."""


def as_text(value: Any) -> str:
    """Return a text as it is, another value as JSON writes it, one that JSON has not as Python."""
    if value is None or isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)  # a text, or a date or a decimal number of Parquet


def is_answer(value: Any) -> bool:
    """Say whether a value is one that can be answered: no list, no object, not empty."""
    return not isinstance(value, list | dict) and value is not None and bool(as_text(value).strip())


def column_of(path: str) -> str:
    """Return the column that a path starts from."""
    return str(steps_of(path)[0])


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path; `[*]` gives the list of what is there in every item.

    A column whose name is the whole path comes first, so `a.b` of a table is found.

    Raises:
        BadRowError: If there is nothing, or null.
    """
    value = row[path] if path in row else _inside(row, path)
    if value is None:
        raise BadRowError(f"field `{path}` is null")
    return value


def _inside(row: Mapping[str, Any], path: str) -> Any:
    values, is_list, gone = [row], False, ""
    for step in steps_of(path):
        if step == EVERY:
            if not all(isinstance(value, list) for value in values):
                raise BadRowError(f"`{gone}` of `{path}` must be a list, found {_kind(values)}")
            values, is_list = [item for value in values for item in value], True
        else:
            values = [_step(value, step, path, gone) for value in values]
        gone += f"[{step}]" if isinstance(step, int) else step if step == EVERY else f".{step}"
        gone = gone.removeprefix(".")
    return Items(values) if is_list else values[0]


def _step(value: Any, step: str | int, path: str, gone: str) -> Any:
    if isinstance(step, int):
        if not isinstance(value, list):
            raise BadRowError(f"`{gone}` of `{path}` must be a list, found {_kind([value])}")
        if not -len(value) <= step < len(value):
            raise BadRowError(f"`{gone}` of `{path}` has {len(value)} items, none at {step}")
        return value[step]
    if not isinstance(value, Mapping):
        raise BadRowError(f"`{gone}` of `{path}` must be an object, found {_kind([value])}")
    if step not in value:
        found = fields_of({str(name): None for name in value})
        raise BadRowError(f"field `{path}` is missing; found {found}")
    return value[step]


def _kind(values: list[Any]) -> str:
    return ", ".join(dict.fromkeys(type(value).__name__ for value in values)) or "nothing"
