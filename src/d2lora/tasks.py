"""What a row of each kind means: its fields, the prompt made of them, and how it is scored.

A task is told from the fields of its rows, or named. The prompts are fixed and written down here
because a score without its prompt cannot be compared (lm-evaluation-harness#2034).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from d2lora.data import Fault, Row, read_source
from d2lora.errors import DataError, listed

Role = Literal["system", "user", "assistant"]
Score = Literal["exact_match", "rouge", "loss"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """A row made ready: the turns that are given, and the completion to be learnt."""

    prompt: tuple[Message, ...]
    completion: str
    source: str = ""
    row: int = 0

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


Reader = Callable[[Mapping[str, Any]], Example]


@dataclass(frozen=True)
class Task:
    """How rows are read and how outputs are scored."""

    name: str
    read: Reader
    score: Score


def _text(row: Mapping[str, Any], field: str, *, empty: bool = False) -> str:
    if field not in row:
        raise BadRowError(f"field `{field}` is missing; found {_fields(row)}")
    value = row[field]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise BadRowError(f"field `{field}` must be text, found {kind}: {value!r:.60}")
    if not value.strip() and not empty:
        raise BadRowError(f"field `{field}` is empty")
    return value


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in row) or "no fields"


def _user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def read_word_problem(row: Mapping[str, Any]) -> Example:
    """Read `question` and `answer`, the fields of GSM8K; the answer ends in `#### N`."""
    answer = _text(row, "answer")
    if "####" not in answer:
        raise BadRowError("field `answer` must end in `#### N`; without it use --task instruct")
    return Example(_user(_text(row, "question")), answer)


def read_title(row: Mapping[str, Any]) -> Example:
    """Read `text` and `title`."""
    instruction = "Write a title for this text."
    return Example(_user(f"{instruction}\n\n{_text(row, 'text').strip()}"), _text(row, "title"))


def read_document(row: Mapping[str, Any]) -> Example:
    """Read `text` alone: no prompt, every token is supervised."""
    return Example((), _text(row, "text"))


def read_instruction(row: Mapping[str, Any]) -> Example:
    """Read messages, prompt/completion, instruction/input/output or question/answer."""
    if "messages" in row:
        return _read_messages(row)
    if "instruction" in row:
        extra = row.get("input") or ""
        if not isinstance(extra, str):
            raise BadRowError(f"field `input` must be text, found {type(extra).__name__}")
        prompt = _text(row, "instruction") + (f"\n\n{extra}" if extra.strip() else "")
        return Example(_user(prompt), _text(row, "output"))
    if "prompt" in row:
        answer = "completion" if "completion" in row else "response"
        if answer not in row:
            raise BadRowError(
                f"field `completion` (or `response`) is missing beside `prompt`; "
                f"found {_fields(row)}"
            )
        source = row.get("source")
        named = source if isinstance(source, str) else ""
        return Example(_user(_text(row, "prompt")), _text(row, answer), named)
    if "question" in row:
        return Example(_user(_text(row, "question")), _text(row, "answer"))
    raise BadRowError(
        "expected messages, prompt/completion, instruction/input/output, question/answer, "
        f"text/title or text; found {_fields(row)}"
    )


def read_prompt(row: Mapping[str, Any]) -> Example:
    """Read the prompt alone of a row of any kind; a completion beside it is not needed."""
    if "messages" in row:
        turns = row["messages"]
        open_end = isinstance(turns, list) and turns and dict(turns[-1]).get("role") == "user"
        closed = [*turns, {"role": "assistant", "content": "-"}] if open_end else turns
        return _read_messages({"messages": closed})
    if "text" in row:
        return read_title({**row, "title": "-"})
    if "question" in row:
        return Example(_user(_text(row, "question")), "")
    if "instruction" in row:
        return read_instruction({**row, "output": "-"})
    return Example(_user(_text(row, "prompt")), "")


def _read_messages(row: Mapping[str, Any]) -> Example:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"field `messages` must be a list of turns, found {type(turns).__name__}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadRowError(f"turn {number} of `messages` must have `role` and `content`")
        role, content = turn["role"], turn["content"]
        if role not in ("system", "user", "assistant"):
            expected = "system, user or assistant"
            raise BadRowError(f"turn {number}: role must be {expected}, found {role!r}")
        if not isinstance(content, str) or not content.strip():
            raise BadRowError(f"turn {number}: `content` must be text that is not empty")
        messages.append(Message(role, content))
    if messages[-1].role != "assistant":
        raise BadRowError(f"the last turn must be the assistant's, found {messages[-1].role!r}")
    if len(messages) == 1:
        raise BadRowError("a user's turn must come before the assistant's")
    return Example(tuple(messages[:-1]), messages[-1].content)


TASKS = {
    "gsm8k": Task("gsm8k", read_word_problem, "exact_match"),
    "titles": Task("titles", read_title, "rouge"),
    "instruct": Task("instruct", read_instruction, "rouge"),
    "text": Task("text", read_document, "loss"),
    "prompts": Task("prompts", read_prompt, "loss"),
}


def task_of(name: str, first_row: Mapping[str, Any]) -> Task:
    """Return the task named, or (`auto`) the one that the first row's fields tell."""
    if name != "auto":
        return TASKS[name]
    fields = first_row.keys()
    if {"question", "answer"} <= fields and "####" in str(first_row["answer"]):
        return TASKS["gsm8k"]
    if {"text", "title"} <= fields:
        return TASKS["titles"]
    if "text" in fields and not fields & {"prompt", "messages", "instruction", "question"}:
        return TASKS["text"]
    return TASKS["instruct"]


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question; `answer` is the index of the right choice."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    benchmark: str = ""


def read_choice(row: Mapping[str, Any]) -> Choice:
    """Read `prompt`, `choices` and `answer` (an index from 0)."""
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadRowError("field `choices` must be a list of at least two texts")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise BadRowError("each of `choices` must be text that is not empty")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise BadRowError(
            f"field `answer` must be an index from 0 to {len(choices) - 1}, got {answer!r}"
        )
    benchmark = row.get("benchmark", "")
    named = benchmark if isinstance(benchmark, str) else ""
    return Choice(_text(row, "prompt"), tuple(choices), answer, named)


@dataclass(frozen=True)
class TaskData:
    """Examples of one task and their raw rows, the sources' manifest and the rows set aside."""

    task: Task
    examples: list[Example]
    rows: list[Row]
    sources: list[dict[str, Any]]
    faults: list[Fault]


def read_task(names: Sequence[str], task_name: str = "auto", *, skip_bad: bool = False) -> TaskData:
    """Read sources as examples of one task.

    Args:
        names: Files or hub data sets.
        task_name: A name of `TASKS`, or `auto`.
        skip_bad: Return bad rows as `faults` instead of raising.

    Raises:
        DataError: If a source cannot be read, no row is left, or rows are bad; all at once.
    """
    if not names:
        raise DataError("no data: give --data one or more files or hub data sets")
    sources = [read_source(name) for name in names]
    faults = [fault for source in sources for fault in source.faults]
    rows = [row for source in sources for row in source.rows]
    task = task_of(task_name, rows[0].values) if rows else TASKS["instruct"]
    examples: list[Example] = []
    good: list[Row] = []
    for row in rows:
        try:
            example = task.read(row.values)
        except BadRowError as error:
            faults.append(
                Fault(row.file, row.line, str(error), json.dumps(row.values, default=str))
            )
        else:
            examples.append(replace(example, row=len(examples)))
            good.append(row)
    _check_faults(faults, len(examples), skip_bad=skip_bad)
    return TaskData(task, examples, good, [source.manifest() for source in sources], faults)


def read_choices(names: Sequence[str]) -> list[Choice]:
    """Read multiple-choice questions.

    Raises:
        DataError: As `read_task`.
    """
    choices: list[Choice] = []
    faults: list[Fault] = []
    for source in map(read_source, names):
        faults += source.faults
        for row in source.rows:
            try:
                choices.append(read_choice(row.values))
            except BadRowError as error:
                faults.append(Fault(row.file, row.line, str(error), ""))
    _check_faults(faults, len(choices), skip_bad=False)
    return choices


def _check_faults(faults: Sequence[Fault], n_good: int, *, skip_bad: bool) -> None:
    if faults and not (skip_bad and n_good):
        advice = "mend them, or set them aside with --skip-bad-rows" if n_good else "none is good"
        raise DataError(
            f"{len(faults)} bad row(s); {advice}:\n{listed([str(fault) for fault in faults])}"
        )
