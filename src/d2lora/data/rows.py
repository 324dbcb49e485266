"""What every kind of row is made of: turns, examples, and fields that must be text."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Span = tuple[int, int]
GZIP = ".gz"
_LINED = (".jsonl", ".ndjson", ".csv", ".tsv")
"""Kinds of files whose rows are known by a line."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What a chat template may show beside: `tool_calls` of an assistant; of a tool its `name` and
    the `tool_call_id` that it answers."""
    fields: tuple[Span, ...] | None = field(default=None, compare=False)
    """Where the content holds what a row brings; the rest is instruction, which no length limit
    cuts. None: all of it."""
    learnt: bool = field(default=True, compare=False)
    """False of an answer that a row keeps out of what is learnt."""

    def to_dict(self) -> dict[str, Any]:
        """Return the turn as a chat template gets it."""
        return {"role": self.role, "content": self.content, **self.more}

    @property
    def of_tools(self) -> bool:
        """Whether it calls a tool or is one's answer, which not every chat format can show."""
        return self.role == "tool" or bool(self.more)

    def altered(self) -> Iterator["Message"]:
        """Return a turn of a tool with each of its calls, or its content, replaced."""
        calls: list[dict[str, Any]] = self.more.get("tool_calls", [])
        for index, call in enumerate(calls):
            other = {**call, "function": {**call["function"], "name": "another_tool"}}
            yield replace(self, more={"tool_calls": [*calls[:index], other, *calls[index + 1 :]]})
        if not calls:
            yield replace(self, content=f"{self.content} and more")


@dataclass(frozen=True)
class Example:
    """A row made ready: the turns that are given, and the completion to be learnt."""

    prompt: tuple[Message, ...]
    completion: str
    source: str = ""
    row: int = 0
    rejected: str | None = None
    """The worse completion, where the row is a preference and `completion` the chosen one."""
    references: tuple[str, ...] = ()
    """Other right answers than `completion`, for scoring."""
    choices: tuple[str, ...] = ()
    """What the answer is chosen from, where rows bring their own."""
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Of an answer that calls tools: `content` and `tool_calls`, for the chat template to write;
    the `completion` is then a plain text of both."""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Tools that the model is offered, which a chat template shows."""
    place: str = field(default="", compare=False)
    """Where the row stands, for messages: file and line."""

    @property
    def answer(self) -> Message:
        """The completion as a turn."""
        if not self.more:
            return Message("assistant", self.completion)
        return Message("assistant", self.more["content"], {"tool_calls": self.more["tool_calls"]})

    def answered(self, turn: Message) -> "Example":
        """Return it with an assistant's turn as the completion."""
        if not turn.of_tools:
            return replace(self, completion=turn.content, more={})
        calls = [json.dumps(c["function"], ensure_ascii=False) for c in turn.more["tool_calls"]]
        text = "\n".join([turn.content, *calls] if turn.content else calls)
        return replace(self, completion=text, more={"content": turn.content, **turn.more})

    @property
    def question(self) -> str:
        """The turns that are given, as one text."""
        return "\n".join(turn.content for turn in self.prompt)

    @property
    def text(self) -> str:
        """What is given and the completion, as one text."""
        return f"{self.question}\n{self.completion}"

    @property
    def texts(self) -> tuple[str, ...]:
        """The same with each right answer."""
        return tuple(f"{self.question}\n{one}" for one in (self.completion, *self.references))


@dataclass(frozen=True)
class Row:
    """A raw row, and where it starts."""

    values: dict[str, Any]
    file: str
    line: int
    """From 1; in JSON lists, Parquet and hub data it counts rows."""

    @property
    def place(self) -> str:
        """Its file and line, for messages."""
        return place(self.file, self.line)

    def fault(self, reason: object) -> "Fault":
        """Return the row as one that cannot be used."""
        return Fault(self.file, self.line, str(reason), json.dumps(self.values, default=str))


@dataclass(frozen=True)
class Layout:
    """How rows lie in a file, as a task's card says it."""

    header: tuple[str, ...] = ()
    """Names of the columns of a table without a header. Empty: its first line has them."""
    rows: str = ""
    """Path to the rows within what the file holds, as in `paragraphs[*].qas[*]`."""


PLAIN = Layout()
"""A row is what a file holds one of."""


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used, why, and its text."""

    file: str
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{place(self.file, self.line)}: {self.reason}"


_DEEPEST = 64
"""Lists and objects inside of each other that a value may have."""


def too_deep(value: Any, left: int = _DEEPEST) -> bool:
    """Say whether a value is nested deeper than what is done with it could follow."""
    if not isinstance(value, list | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return left == 0 or any(too_deep(one, left - 1) for one in inner)


def readable(row: Row) -> Row | Fault:
    """Return a row, or the fault that it is nested too deeply."""
    if any(map(too_deep, row.values.values())):
        return Fault(row.file, row.line, TOO_DEEP, "")
    return row


TOO_DEEP = f"nested too deeply, more than {_DEEPEST} lists or objects inside of each other"


def from_json(text: str) -> Any:
    """Return the value of a JSON text inside of a row.

    Raises:
        ValueError: If it is not JSON, nested too deeply, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if too_deep(value):
        raise ValueError(TOO_DEEP)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def with_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Return a row's values with null for NaN, which stands for a missing number."""
    missing = [name for name, one in values.items() if isinstance(one, float) and math.isnan(one)]
    return {**values, **dict.fromkeys(missing)} if missing else values


def kind_of(path: Path) -> str:
    """Return a file's suffix, `.JSONL` and `.jsonl.gz` as `.jsonl`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == GZIP else suffix


def place(file: str, line: int) -> str:
    """Return a row's file and line, for messages."""
    return f"{file}, {'line' if is_lined(file) else 'row'} {line}"


def is_lined(file: str) -> bool:
    """Say whether the rows of a file are known by a line."""
    return kind_of(Path(file)) in _LINED


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
    return (Message("user", fixed + text, fields=((len(fixed), len(fixed + text)),)),)


def repeated(names: Iterable[str]) -> str:
    """Return the names that come more than once, in quotes."""
    return ", ".join(f"`{name}`" for name, n in Counter(names).items() if n > 1)
