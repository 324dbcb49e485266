"""What every kind of row is made of: turns, examples, and fields checked one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    n_fixed: int = field(default=0, compare=False)
    """Signs of an instruction at the start of the content, which no length limit cuts."""


@dataclass(frozen=True)
class Example:
    """A row made ready: the turns that are given, and the completion to be learnt."""

    prompt: tuple[Message, ...]
    completion: str
    source: str = ""
    row: int = 0
    rejected: str | None = None
    """The worse completion, where the row is a preference and `completion` the chosen one."""
    place: str = field(default="", compare=False)
    """Where the row stands, for messages: file and line."""

    @property
    def question(self) -> str:
        """The turns that are given, as one text."""
        return "\n".join(turn.content for turn in self.prompt)

    @property
    def text(self) -> str:
        """What is given and the completion, as one text."""
        return f"{self.question}\n{self.completion}"


class BadRowError(ValueError):
    """A row cannot be read; its text says what was expected and what was found."""


def text_field(row: Mapping[str, Any], field: str, *, empty: bool = False) -> str:
    """Return a field that must be text.

    Raises:
        BadRowError: If it is missing, of another type, or empty where that is not allowed.
    """
    if field not in row:
        raise BadRowError(f"field `{field}` is missing; found {fields_of(row)}")
    value = row[field]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise BadRowError(f"field `{field}` must be text, found {kind}: {value!r:.60}")
    if not value.strip() and not empty:
        raise BadRowError(f"field `{field}` is empty")
    return value


def fields_of(row: Mapping[str, Any]) -> str:
    """Return the names of a row's fields, for messages."""
    return ", ".join(f"`{name}`" for name in row) or "no fields"


def user(text: str, instruction: str = "") -> tuple[Message, ...]:
    """Return a prompt of one user's turn; an empty line parts an instruction and a text."""
    fixed = f"{instruction}\n\n" if instruction else ""
    return (Message("user", fixed + text, len(fixed)),)


def turns_of(row: Mapping[str, Any], field: str) -> list[Message]:
    """Return a field that must be a list of turns, each with `role` and `content`.

    Raises:
        BadRowError: If it is not, naming the turn.
    """
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"field `{field}` must be a list of turns, found {type(turns).__name__}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadRowError(f"turn {number} of `{field}` must have `role` and `content`")
        role, content = turn["role"], turn["content"]
        if role not in ("system", "user", "assistant"):
            expected = "system, user or assistant"
            raise BadRowError(f"turn {number}: role must be {expected}, found {role!r}")
        if not isinstance(content, str) or not content.strip():
            raise BadRowError(f"turn {number}: `content` must be text that is not empty")
        messages.append(Message(role, content))
    return messages
