"""Closed answers of rows that bring their own choices, as a task card's `choices` names them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import field_validator, model_validator

from d2lora.data.paths import as_text, is_answer, steps_of, value_at
from d2lora.data.rows import BadRowError, repeated
from d2lora.settings import Settings

Per = Literal["answer", "character"]


class Choices(Settings):
    """Where a row has what its answer is chosen from, and which of it is right."""

    texts: str | tuple[str, ...]
    """Path to a list of texts, or paths to a text each; what is empty in a row is left out."""
    right: str = ""
    """Path to what says which one is right: its place, from 0, or its name. Empty: `completion`
    gives the right text."""
    names: str | tuple[str, ...] = ()
    """What `right` calls the choices: a path to a list in the row, or the names themselves, as in
    `[A, B, C, D]`. Empty: their places, from 0."""
    per: Per = "answer"
    """What is compared: answer, the log-probability of a whole answer, its end included, as of
    labels; or character, that of the text alone over its characters (`acc_norm` of
    lm-evaluation-harness), so that long ones are not at a disadvantage."""

    @field_validator("texts", "right", "names")
    @classmethod
    def _paths(cls, value: str | tuple[str, ...], info: Any) -> str | tuple[str, ...]:
        if isinstance(value, tuple) and (twice := repeated(value)):
            raise ValueError(f"{twice} is named more than once")
        paths = value if isinstance(value, tuple) and info.field_name == "texts" else [value]
        for path in paths:
            if isinstance(path, str) and (path or info.field_name == "texts"):
                steps_of(path)
        return value

    @model_validator(mode="after")
    def _named_for_something(self) -> "Choices":
        if self.names and not self.right:
            raise ValueError("`names` are what `right` calls the choices: give `right`, too")
        if isinstance(self.texts, tuple) and len(self.texts) < 2:
            raise ValueError("`texts`: give the path to a list, or those of two texts or more")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that it looks at."""
        texts = self.texts if isinstance(self.texts, tuple) else (self.texts,)
        names = (self.names,) if isinstance(self.names, str) else ()
        return (*texts, *names, *([self.right] if self.right else []))


class Options(NamedTuple):
    """The choices of a row, at least two."""

    texts: tuple[str, ...]
    right: str | None
    """The right one; None where the card's `completion` tells."""


NO_OPTIONS = Options((), None)
"""Those of a card without choices."""


def options_of(row: Mapping[str, Any], choices: Choices) -> Options:
    """Return the choices of a row.

    Raises:
        BadRowError: If there are less than two, or none is named as right.
    """
    texts = _texts(row, choices)
    there = tuple(text for text in texts if text)
    if len(there) < 2:
        raise BadRowError(f"at least two choices are needed, found {len(there)}")
    if not choices.right:
        return Options(there, None)
    names = _names(row, choices, len(texts))
    right = as_text(value_at(row, choices.right)).strip()
    if right not in names[: len(texts)]:
        called = "" if choices.names else ", their places; `names` says what else they are called"
        raise BadRowError(
            f"field `{choices.right}` is {right!r:.60}, which is none of the choices "
            f"{', '.join(names[: len(texts)])}{called}"
        )
    text = texts[names.index(right)]
    if not text:
        raise BadRowError(f"the right choice, {right!r:.60}, is empty")
    return Options(there, text)


def _texts(row: Mapping[str, Any], choices: Choices) -> list[str]:
    if isinstance(choices.texts, str):
        found = value_at(row, choices.texts)
        if not isinstance(found, list):
            raise BadRowError(
                f"field `{choices.texts}` must be a list of texts, found {type(found).__name__}: "
                f"{found!r:.60}"
            )
        named = [(choices.texts, one) for one in found]
    else:
        named = [(path, _text_at(row, path)) for path in choices.texts]
    for path, one in named:
        if isinstance(one, list | dict):
            raise BadRowError(f"field `{path}` must hold texts, found {one!r:.60}")
    return ["" if one is None else as_text(one).strip() for _, one in named]


def _text_at(row: Mapping[str, Any], path: str) -> Any:
    """Return what is there, None where it is null."""
    return None if path in row and row[path] is None else value_at(row, path)


def _names(row: Mapping[str, Any], choices: Choices, n: int) -> Sequence[str]:
    if not choices.names:
        return [str(place) for place in range(n)]
    if isinstance(choices.names, tuple):
        found: Any = list(choices.names)
        enough = len(found) >= n
    else:
        found = value_at(row, choices.names)
        enough = isinstance(found, list) and len(found) == n
    if not enough or not all(map(is_answer, found)):
        raise BadRowError(f"`names` must name each of the {n} choices, found {found!r:.60}")
    return [as_text(name).strip() for name in found]
