"""The formats of rows with questions and answers: how each is recognized, and what it reads.

A row is of the first format in `FORMATS` all of whose `needs` it has. A field that is null is not
there, so a table of rows of several formats reads as each of them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from d2lora.data.paths import column_of
from d2lora.data.rows import BadRowError, Example, Message, fields_of, from_json, text_field
from d2lora.data.turns import WEIGHT, conversation_of, turns_of, unread_of

Fields = Mapping[str, Any]
Prompt = tuple[Message, ...]

SYSTEM = ("system", "system_prompt")
TOOLS = "tools"
BESIDE = (*SYSTEM, "history", "context", TOOLS)
"""Read beside a question: a system turn, turns that came before, text that belongs to it, the tools
that the model is offered."""


@dataclass(frozen=True)
class Format:
    """One way to write rows down."""

    name: str
    needs: tuple[str, ...]
    """Fields that a row of the format has."""
    reads: tuple[str, ...] = ()
    """Fields that are read where they are there."""
    turned: tuple[str, ...] | None = None
    """Fields that may hold turns. None: all of them."""
    of_answers: tuple[str, ...] = ()
    """What is read of an assistant's turn beside the turn itself."""

    def unused(self, row: Fields) -> set[str]:
        """Return the fields of a row that are not read; those of turns as `messages[].name`."""
        read = {*self.needs, *self.reads}
        turned = read - {TOOLS} if self.turned is None else self.turned
        within = {
            f"{field}[].{name}"
            for field in turned
            for name in unread_of(row.get(field), self.of_answers)
        }
        return {name for name, value in row.items() if value is not None} - read | within


@dataclass(frozen=True, kw_only=True)
class Conversation(Format):
    """A format of questions and answers."""

    prompt: Callable[[Fields], Prompt]
    answer: Callable[[Fields], Message]

    def read(self, row: Fields) -> Example:
        """Read a row.

        Raises:
            BadRowError: If a field is not what it must be.
        """
        source = row.get("source")
        named = source if isinstance(source, str) else ""
        asked = Example(self.prompt(row), "", named, tools=_tools(row))
        return asked.answered(self.answer(row))


def format_of(formats: Sequence[Format], row: Fields) -> Format | None:
    """Return the first of the formats whose fields a row has."""
    there = {name for name, value in row.items() if value is not None}
    return next((known for known in formats if there.issuperset(known.needs)), None)


def given(row: Fields, field: str, inputs: Sequence[str] = ()) -> Prompt:
    """Return the prompt in `field` (text or turns) with what stands beside it.

    Raises:
        BadRowError: If a field is not what it must be.
    """
    if isinstance(row.get(field), list):
        turns = turns_of(row, field)
        if turns[-1].role == "assistant":
            raise BadRowError(f"the last turn of `{field}` must be the user's")
    else:
        turns = [Message("user", text_field(row, field))]
    return beside(row, turns, inputs)


def beside(row: Fields, turns: Sequence[Message], inputs: Sequence[str] = ()) -> Prompt:
    """Return the turns of a prompt with what stands in fields beside them.

    Texts that belong to the prompt, the `inputs` named and `context`, follow after an empty line.
    What `system` and `history` hold comes before.

    Raises:
        BadRowError: If a field is not what it must be.
    """
    turns = list(turns)
    for name in (*inputs, "context"):
        if extra := _optional(row, name):
            last = turns[-1]
            content = f"{last.content}\n\n{extra}"
            own = (len(content) - len(extra), len(content))
            turns[-1] = replace(last, content=content, fields=(*(last.fields or ()), own))
    return _after_system(row, [*_history(row), *turns])


def _after_system(row: Fields, turns: Sequence[Message]) -> Prompt:
    """Put the system turn of a separate field before the others."""
    for name in SYSTEM:
        if system := _optional(row, name):
            if turns[0].role != "system":
                return (Message("system", system), *turns)
            if turns[0].content != system:
                raise BadRowError(f"the system turn differs from `{name}`")
    return tuple(turns)


def _history(row: Fields) -> list[Message]:
    """Return earlier turns: pairs of question and answer, or turns."""
    pairs = row.get("history")
    if not pairs:
        return []
    if isinstance(pairs, list) and all(isinstance(turn, dict) for turn in pairs):
        return turns_of(row, "history")
    turns: list[Message] = []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs], 1):
        texts = pair if isinstance(pair, list | tuple) else ()
        if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise BadRowError(
                f"`history` must be a list of pairs [question, answer], found {pair!r:.60} as "
                f"number {number}"
            )
        turns += [Message("user", texts[0]), Message("assistant", texts[1])]
    return turns


def _optional(row: Fields, name: str) -> str | None:
    """Return a text that may be missing or empty."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text_field(row, name)


def _tools(row: Fields) -> tuple[Mapping[str, Any], ...]:
    """Return the tools that a row offers, as OpenAI's API describes them; they may be JSON text."""
    tools = row.get(TOOLS)
    if isinstance(tools, str):
        try:
            tools = from_json(tools) if tools.strip() else None
        except ValueError:
            raise BadRowError(f"`{TOOLS}` is a text that is not JSON: {tools!r:.60}") from None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError(f"`{TOOLS}` must be a list of objects, found {tools!r:.60}")
    return tuple(tools)


def _answer(row: Fields, field: str) -> Message:
    """Return an answer: text, or one turn of the assistant."""
    if not isinstance(row.get(field), list):
        return Message("assistant", text_field(row, field))
    turns = turns_of(row, field)
    if len(turns) != 1 or turns[0].role != "assistant":
        found = ", ".join(turn.role for turn in turns)
        raise BadRowError(f"`{field}` must hold one turn, the assistant's, found {found}")
    return turns[0]


def _turns_given(row: Fields, field: str) -> Prompt:
    """Return the turns before the last answer that is learnt."""
    turns = conversation_of(row, field)
    before = turns[:-1] if turns[-1].role == "assistant" else turns
    if not before:
        raise BadRowError("a user's turn must come before the assistant's")
    return _after_system(row, before)


def _last_answer(row: Fields, field: str) -> Message:
    last = conversation_of(row, field)[-1]
    if last.role != "assistant":
        raise BadRowError(f"the last turn must be the assistant's, found {last.role!r}")
    return last


def _turns(name: str, field: str) -> Conversation:
    """Return a format of whole conversations, the last answer of which is learnt."""
    prompt, answer = partial(_turns_given, field=field), partial(_last_answer, field=field)
    return Conversation(
        name, (field,), (*SYSTEM, TOOLS, "source"), of_answers=(WEIGHT,), prompt=prompt,
        answer=answer,
    )  # fmt: skip


def _asked(name: str, question: str, answer: str, *inputs: str) -> Conversation:
    """Return a format of one question and its answer."""
    prompt, read = partial(given, field=question, inputs=inputs), partial(_answer, field=answer)
    return Conversation(
        name, (question, answer), (*inputs, *BESIDE, "source"), prompt=prompt, answer=read
    )


FORMATS = (
    _turns("messages", "messages"),
    _turns("ShareGPT", "conversations"),
    _asked("Alpaca", "instruction", "output", "input"),
    _asked("Dolly", "instruction", "response", "input"),
    _asked("prompt/completion", "prompt", "completion"),
    _asked("prompt/response", "prompt", "response"),
    _asked("question/answer", "question", "answer"),
    _asked("question/response", "question", "response"),
)
_ANSWERS = tuple(name for known in FORMATS for name in known.needs[1:])
PROMPTS = tuple(
    replace(
        known,
        name=f"prompts in `{known.needs[0]}`",
        needs=known.needs[:1],
        reads=(*known.reads, *_ANSWERS),
        answer=lambda _: Message("assistant", ""),
    )
    for known in FORMATS
)
"""The same, of which only the prompt is asked."""


def missing(row: Fields) -> str:
    """Return a message on why a row has no known format."""
    there = format_of(PROMPTS, row)
    if there is None:
        return (
            "expected messages, conversations, prompt/completion, instruction/input/output, "
            f"instruction/context/response, question/answer, text/title or text; "
            f"found {fields_of(row)}"
        )
    asked = there.needs[0]
    first, *others = [known.needs[1] for known in FORMATS if known.needs[0] == asked]
    either = f" (or {', '.join(f'`{name}`' for name in others)})" if others else ""
    return f"field `{first}`{either} is missing beside `{asked}`; found {fields_of(row)}"


class FormatsSeen:
    """The formats that the rows of a source had, and the fields that were not used."""

    def __init__(self, source: str) -> None:
        """Start with no rows."""
        self._source = source
        self._formats: Counter[str] = Counter()
        self._beside: dict[str, None] = {}
        self._unused: dict[str, None] = {}
        self._absent: set[str] | None = None

    def add(self, formats: Sequence[Format], row: Fields) -> list[str]:
        """Note a row that was read in one of the formats; return the unused fields new in it."""
        known = format_of(formats, row) or formats[-1]
        self._formats[known.name] += 1
        beside = (name for name in known.reads if name in BESIDE and row.get(name))
        self._beside.update(dict.fromkeys(beside))
        absent = {
            path
            for path in known.needs
            if row.get(path) is None and row.get(column_of(path)) is None
        }
        self._absent = absent if self._absent is None else self._absent & absent
        new = sorted(known.unused(row) - self._unused.keys())
        self._unused.update(dict.fromkeys(new))
        return new

    def report(self, say: Callable[[str], None] | None) -> None:
        """Report it in one line, where rows were read."""
        if say is None or not self._formats:
            return
        rows = ", ".join(f"{n:,} {name}" for name, n in self._formats.items())
        beside = f" with {_named(self._beside)}" if self._beside else ""
        unused = f"; not used: {_named(self._unused)}" if self._unused else ""
        absent = f"; in no row: {_named(sorted(self._absent))}" if self._absent else ""
        say(f"{self._source}: rows by format: {rows}{beside}{unused}{absent}")


def _named(fields: Iterable[str]) -> str:
    return ", ".join(f"`{field}`" for field in fields)
