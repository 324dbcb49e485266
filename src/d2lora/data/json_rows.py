"""Rows of JSON Lines and of JSON lists; a row that would not be read exactly is a fault."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2lora.data.opening import lines_of, opened, whole_text
from d2lora.data.rows import TOO_DEEP, Fault, Row, repeated, too_deep
from d2lora.errors import DataError

_GAP = re.compile(r"[\s,:]*")
"""What stands between the values of valid JSON."""
_ROWS = "data"
"""The field of an object that holds its rows."""


def read_json_lines(path: Path) -> Iterator[Row | Fault]:
    """Read one object a line."""
    with opened(path) as file:
        for number, line in enumerate(lines_of(file, path), 1):
            text = line.strip()
            if text:
                yield _parsed(str(path), number, text)


class _UnusableError(ValueError):
    """JSON of which something would be lost or made up in reading."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = repeated(name for name, _ in pairs)
        raise _UnusableError(f"{twice} appears more than once in an object")
    return values


def _constant(name: str) -> None:
    if name != "NaN":  # which pandas writes where a value is missing
        raise _UnusableError(f"{name} is not JSON; write a number or null")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _rows_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if sum(name == _ROWS for name, _ in pairs) > 1:
        raise _UnusableError(f"`{_ROWS}` appears more than once in an object")
    return dict(pairs)


_LENIENT = json.JSONDecoder(parse_int=lambda _: 0, object_pairs_hook=_rows_once)


def _parsed(file: str, line: int, text: str) -> Row | Fault:
    try:
        value = _STRICT.decode(text)
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} at column {error.colno}"
    except _UnusableError as error:
        reason = str(error)
    except ValueError:  # of Python, for one integer that takes long to read
        reason = "an integer of thousands of digits; write it as text"
    except RecursionError:
        reason = TOO_DEEP
    else:
        if isinstance(value, dict):
            half = _half_character(value) if "\\u" in text else None
            if half is None and not any(map(too_deep, value.values())):
                return Row(value, file, line)
            reason = half or TOO_DEEP
        else:
            reason = f"expected an object, found {type(value).__name__}"
    return Fault(file, line, reason, text)


def _half_character(values: dict[str, Any]) -> str | None:
    for name, value in values.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ascii(error.object[error.start])[1:-1]
            field = ascii(name)[1:-1]
            return f"field `{field}` holds {code}, half of a surrogate pair and no character"
    return None


def read_json(path: Path) -> Iterator[Row | Fault]:
    """Read a list of objects, be it in a field of an object, or an object of objects.

    Of an object of objects each value is a row, with its name as `key` where it has no such field.
    A file of an object a line, as some are published under this name, is read as JSON Lines.

    Raises:
        DataError: If it is anything else.
    """
    with opened(path) as file:
        text = whole_text(file, path)
    try:
        value = _LENIENT.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _is_object(text.partition("\n")[0]):
            yield from read_json_lines(path)
            return
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: not JSON: {error.msg} at {place}") from None
    except _UnusableError as error:
        raise DataError(f"{path}: {error}") from None
    except RecursionError:
        raise DataError(f"{path}: {TOO_DEEP}") from None
    if not isinstance(value, dict | list):
        raise DataError(f"{path}: expected a list of rows, found {type(value).__name__}")
    field = _field_of_rows(value, path) if isinstance(value, dict) else None
    for number, (key, row) in enumerate(_row_texts(text, field), 1):
        item = _parsed(str(path), number, row)
        if key is not None and isinstance(item, Row):
            item = replace(item, values={"key": key, **item.values})
        yield item


def _is_object(text: str) -> bool:
    try:
        return isinstance(_LENIENT.decode(text), dict)
    except ValueError:
        return False


def _field_of_rows(value: dict[str, Any], path: Path) -> str | None:
    """Return the field that holds the rows; None where every field is one.

    Raises:
        DataError: If neither is so.
    """
    lists = [name for name, rows in value.items() if _are_rows(rows)]
    if isinstance(value.get(_ROWS), list) and lists in ([], [_ROWS]):
        return _ROWS
    if len(lists) == 1:
        return lists[0]
    if lists:
        raise DataError(
            f"{path}: it holds rows in `{lists[0]}` and in `{lists[1]}`; write each list into its "
            "own file"
        )
    if value and all(isinstance(row, dict) for row in value.values()):
        return None
    names = ", ".join(f"`{name}`" for name in list(value)[:5])
    raise DataError(
        f"{path}: expected a list of rows, found an object with {names or 'nothing'}; write its "
        "rows as a list, or one a line in a .jsonl file"
    )


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _row_texts(text: str, field: str | None) -> Iterator[tuple[str | None, str]]:
    """Return the text of each row of valid JSON, with its name in an object of objects.

    Args:
        text: A list of rows, or an object.
        field: The field of the object that holds the list; None: all its fields are rows.
    """

    def after_gap(at: int) -> int:
        match = _GAP.match(text, at)
        assert match is not None
        return match.end()

    def decoded(at: int) -> tuple[Any, int]:
        value, end = _LENIENT.raw_decode(text, at)
        return value, after_gap(end)

    at = after_gap(0)
    in_object = text[at] == "{"
    if in_object and field is not None:
        key, at = decoded(after_gap(at + 1))
        while key != field:
            _, at = decoded(at)
            key, at = decoded(at)
        in_object = False
    at = after_gap(at + 1)
    while text[at] not in "]}":
        key = None
        if in_object:
            key, at = decoded(at)
        begin = at
        _, at = decoded(at)
        yield key, text[begin:at].rstrip(" \t\r\n,")
