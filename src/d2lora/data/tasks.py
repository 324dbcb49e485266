"""What a row of each kind means: its fields, the prompt made of them, and how it is scored.

A task is named, or detected from the fields of its rows. The prompts are fixed and written down
here because a score without its prompt cannot be compared (lm-evaluation-harness#2034).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from d2lora.data.answers import target_answer
from d2lora.data.formats import (
    BESIDE,
    FORMATS,
    PROMPTS,
    Conversation,
    Format,
    FormatsSeen,
    format_of,
    given,
    missing,
)
from d2lora.data.preferences import read_preference
from d2lora.data.rows import BadRowError, Example, Fault, place, text_field, user
from d2lora.data.sources import Row, check_different, stream_source
from d2lora.errors import DataError, counted, listed

Score = Literal["exact_match", "rouge", "loss", "preference"]


Reader = Callable[[Mapping[str, Any]], Example]
Say = Callable[[str], None]
Check = Callable[[Example], None]


@dataclass(frozen=True)
class Task:
    """How rows are read and how outputs are scored."""

    name: str
    read: Reader
    score: Score
    formats: tuple[Format, ...]
    """What its rows may look like."""


def read_word_problem(row: Mapping[str, Any]) -> Example:
    """Read `question` and `answer`, the fields of GSM8K; the answer ends in `#### N`."""
    answer = text_field(row, "answer")
    if "####" not in answer:
        raise BadRowError("field `answer` must end in `#### N`; without it use --task instruct")
    if target_answer(answer) is None:
        raise BadRowError(
            "field `answer` must end in `#### N`, one space and a number alone such as 42, 1,250, "
            f"0.5 or 1/6; found {answer[answer.index('####') :].strip()!r:.60}"
        )
    return Example(given(row, "question"), answer)


def read_title(row: Mapping[str, Any]) -> Example:
    """Read `text` and `title`."""
    instruction = "Write a title for this text."
    return Example(user(text_field(row, "text").strip(), instruction), text_field(row, "title"))


def read_document(row: Mapping[str, Any]) -> Example:
    """Read `text` alone: no prompt, every token is supervised."""
    return Example((), text_field(row, "text"))


def read_instruction(row: Mapping[str, Any]) -> Example:
    """Read a conversation in any of `formats.FORMATS`."""
    known = format_of(FORMATS, row)
    if not isinstance(known, Conversation):
        raise BadRowError(missing(row))
    if str(row.get("label")).lower() == "false":
        raise BadRowError(
            "`label` is false: as in KTO, this answer is one to avoid; leave such rows out, or "
            "pair them with better answers as `chosen` and `rejected`"
        )
    return known.read(row)


def read_prompt(row: Mapping[str, Any]) -> Example:
    """Read the prompt alone of a row of any kind; a completion beside it is not needed."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return replace(read_preference(row), completion="", rejected=None)
    known = format_of(PROMPTS, row)
    if isinstance(known, Conversation):
        return known.read(row)
    if "text" in row:
        return replace(read_title({**row, "title": "-"}), completion="")
    raise BadRowError(missing(row))


_GSM8K = Format("GSM8K", ("question", "answer"), BESIDE)
_TITLE = Format("text/title", ("text", "title"))
_DOCUMENT = Format("documents", ("text",))
_PREFERENCE = Format("preferences", ("chosen", "rejected"), ("prompt", *BESIDE))
TASKS = {
    "gsm8k": Task("gsm8k", read_word_problem, "exact_match", (_GSM8K,)),
    "titles": Task("titles", read_title, "rouge", (_TITLE,)),
    "instruct": Task("instruct", read_instruction, "rouge", FORMATS),
    "text": Task("text", read_document, "loss", (_DOCUMENT,)),
    "preferences": Task("preferences", read_preference, "preference", (_PREFERENCE,)),
    "prompts": Task("prompts", read_prompt, "loss", (_PREFERENCE, *PROMPTS, _TITLE, _DOCUMENT)),
}
_LABELS = frozenset(
    "label labels label_text label_name class target targets sentiment intent summary answer "
    "answers output response completion translation category stars rating score polarity topic "
    "emotion".split()
)
"""Fields that are labels where they stand beside `text`."""


def task_of(name: str, first_row: Mapping[str, Any]) -> Task:
    """Return the task named, or (`auto`) the one detected from the first row's fields."""
    if name != "auto":
        return TASKS[name]
    fields = {field for field, value in first_row.items() if value is not None}
    if {"chosen", "rejected"} <= fields:
        return TASKS["preferences"]
    if {"question", "answer"} <= fields and "####" in str(first_row["answer"]):
        return TASKS["gsm8k"]
    if {"text", "title"} <= fields:
        return TASKS["titles"]
    if "text" in fields and format_of(PROMPTS, first_row) is None:
        return TASKS["text"]
    return TASKS["instruct"]


@dataclass(frozen=True)
class TaskData:
    """Examples of one task and their raw rows, the sources' manifest and the bad rows."""

    task: Task
    examples: Sequence[Example]
    rows: Sequence[Row]
    sources: list[dict[str, Any]]
    faults: list[Fault]


class Reading:
    """One pass over sources as rows of one task; bad rows are collected on the way."""

    def __init__(
        self, names: Sequence[str], task_name: str, say: Say | None = None,
        check: Check | None = None,
    ) -> None:  # fmt: skip
        """Name what to read.

        Args:
            names: Files or hub data sets.
            task_name: A name of `TASKS`, or `auto`: detected from the first row.
            say: Gets a message per source: the formats of its rows, and the fields not used.
            check: Raises `BadRowError` for an example that cannot be used.

        Raises:
            DataError: If there are no names, or one is given twice.
        """
        if not names:
            raise DataError("no data: give --data one or more files or hub data sets")
        check_different(names)
        self._names, self._task_name, self._say, self._check = names, task_name, say, check
        self.task: Task | None = None
        self.sources: list[dict[str, Any]] = []
        self.faults: list[Fault] = []

    def __iter__(self) -> Iterator[tuple[Row, Example]]:
        """Yield the good rows, each with its example.

        Raises:
            DataError: If a source cannot be read, or holds labels beside what would be learnt as
                documents.
        """
        n_good = 0
        for name in self._names:
            stream, n_rows, seen = stream_source(name), 0, FormatsSeen(name)
            for item in stream.items:
                if isinstance(item, Fault):
                    self.faults.append(item)
                    continue
                n_rows += 1
                self.task = self.task or task_of(self._task_name, item.values)
                try:
                    example = self.task.read(item.values)
                    if self._check is not None:
                        self._check(example)
                except BadRowError as error:
                    self.faults.append(item.fault(error))
                else:
                    new = seen.add(self.task.formats, item.values)
                    if self.task.name == "text" and self._task_name == "auto":
                        _refuse_labels(name, new)
                    where = place(item.file, item.line)
                    yield item, replace(example, row=n_good, place=where)
                    n_good += 1
            seen.report(self._say)
            read = {"file": stream.name, "rows": n_rows, "sha256": stream.fingerprint()}
            self.sources.append(read)

    def data(self, examples: Sequence[Example], rows: Sequence[Row], *, skip_bad: bool) -> TaskData:
        """Return what was read, after the pass.

        Raises:
            DataError: If rows are bad and may not be skipped, or none is good; all at once.
        """
        check_faults(self.faults, len(rows), skip_bad=skip_bad)
        assert self.task is not None
        return TaskData(self.task, examples, rows, self.sources, self.faults)


def read_task(
    names: Sequence[str],
    task_name: str = "auto",
    *,
    skip_bad: bool = False,
    say: Say | None = None,
    check: Check | None = None,
) -> TaskData:
    """Read sources as examples of one task.

    Args:
        names: Files or hub data sets.
        task_name: A name of `TASKS`, or `auto`.
        skip_bad: Return bad rows as `faults` instead of raising.
        say: As for `Reading`.
        check: As for `Reading`.

    Raises:
        DataError: If a source cannot be read, no row is left, or rows are bad; all at once.
    """
    reading = Reading(names, task_name, say, check)
    rows: list[Row] = []
    examples: list[Example] = []
    for row, example in reading:
        rows.append(row)
        examples.append(example)
    return reading.data(examples, rows, skip_bad=skip_bad)


def _refuse_labels(name: str, fields: Iterable[str]) -> None:
    labels = [field for field in fields if field.lower() in _LABELS]
    if labels:
        raise DataError(
            f"{name}: `text` with `{labels[0]}` looks like labelled data, not documents; rename "
            "the columns, as in `prompt` and `completion`, to learn one from the other, or drop "
            f"`{labels[0]}` (or set --task text) to learn the texts alone"
        )


def check_faults(faults: Sequence[Fault], n_good: int, *, skip_bad: bool) -> None:
    """Check that no row is bad, or that bad ones may be skipped and good ones are left.

    Raises:
        DataError: If not; with all of them.
    """
    if faults and not (skip_bad and n_good):
        advice = "fix them, or skip them with --skip-bad-rows" if n_good else "none is good"
        raise DataError(
            f"{counted(len(faults), 'bad row')}; {advice}:\n{listed([*map(str, faults)])}"
        )
