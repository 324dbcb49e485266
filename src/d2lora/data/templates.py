"""Templates of task cards: text with a row's fields in braces, as in `Which intent? {text}`.

A field is named by its path. Texts stand as they are, lists of `[*]` one item a line, numbers and
booleans as in JSON; `{x:json}` writes any value as JSON, `{x:.15g}` and the like format a number
as Python does. `{x?}` may be missing, null or empty. `{{` and `}}` are braces.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from string import Formatter
from typing import Any, NamedTuple

from d2lora.data.paths import Items, as_text, steps_of, value_at
from d2lora.data.rows import BadRowError, Span

_JSON = "json"


class Filled(NamedTuple):
    """A template filled in."""

    text: str
    fields: tuple[Span, ...]
    """Where the row's own text stands."""


class _Part(NamedTuple):
    literal: str
    path: str | None
    form: str
    optional: bool


@dataclass(frozen=True)
class Template:
    """A text with fields."""

    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, text: str) -> "Template":
        """Parse a template.

        Raises:
            ValueError: If braces do not match, or a field is not a path.
        """
        parts: list[_Part] = []
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{error}; write braces of the text itself as {{{{ and }}}}") from None
        for literal, path, form, conversion in parsed:
            if conversion:
                raise ValueError(f"`!{conversion}` in {{{path}}} is not supported")
            named = None if path is None else path.removesuffix("?")
            if named is not None:
                steps_of(named)
            parts.append(_Part(literal, named, form or "", named != path))
        return cls(tuple(parts))

    @property
    def paths(self) -> list[str]:
        """The fields it shows."""
        return [part.path for part in self.parts if part.path is not None]

    @property
    def is_field(self) -> bool:
        """Whether it is one field and nothing else."""
        return len(self.parts) == 1 and not self.parts[0].literal and not self.parts[0].form

    def fill(self, row: Mapping[str, Any]) -> Filled:
        """Fill in the fields of a row.

        Raises:
            BadRowError: If one is missing, null, empty, or cannot be formatted.
        """
        text, spans = "", list[Span]()
        for part in self.parts:
            text += part.literal
            if part.path is not None:
                shown = _optional(row, part) if part.optional else _needed(row, part)
                spans.append((len(text), len(text) + len(shown)))
                text += shown
        return Filled(text, tuple(spans))


def _needed(row: Mapping[str, Any], part: _Part) -> str:
    shown = _shown(value_at(row, str(part.path)), part)
    if not shown.strip():
        raise BadRowError(
            f"field `{part.path}` is empty; where that is right, write {{{part.path}?}}"
        )
    return shown


def _optional(row: Mapping[str, Any], part: _Part) -> str:
    if f"{part.path}?" in row:
        raise BadRowError(
            f"{{{part.path}?}} is a field `{part.path}` that may be missing, and the row has one "
            f"that is called `{part.path}?`; give it another name in `columns`"
        )
    try:
        value = value_at(row, str(part.path))
    except BadRowError:
        return ""
    return _shown(value, part)


def _shown(value: Any, part: _Part) -> str:
    if part.form == _JSON:
        return json.dumps(value, ensure_ascii=False, default=str)
    if part.form:
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise BadRowError(
                f"field `{part.path}` must be a number for {{{part.path}:{part.form}}}, found "
                f"{type(value).__name__}: {value!r:.60}"
            )
        try:
            shown = format(value, part.form)
        except (ValueError, OverflowError) as error:
            raise BadRowError(f"{{{part.path}:{part.form}}}: {error}") from None
        if part.form == "g" and float(shown) != value:
            raise BadRowError(
                f"{{{part.path}:g}} rounds {value} to {shown}; write {{{part.path}:.15g}}"
            )
        return shown
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Items):
        return "\n".join(_shown(item, part) for item in value)
    if isinstance(value, bytes):
        raise BadRowError(f"field `{part.path}` holds bytes, not a text: {value!r:.60}")
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise BadRowError(
            f"field `{part.path}` is {kind}, not a text: {value!r:.60}; write {{{part.path}:json}} "
            f"to show it as JSON{f', {{{part.path}[*]}} for an item a line' * (kind == 'a list')}"
        )
    return as_text(value)
