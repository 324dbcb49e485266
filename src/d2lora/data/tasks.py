"""Tasks: rows as their card says, see `cards`.

A task is named, a card's file, or detected from the fields of its first row. What a prompt holds is
written down in the card, because a score without its prompt cannot be compared
(lm-evaluation-harness#2034).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

from d2lora.data.answers import target_fault
from d2lora.data.cards import SAME_PROMPT, Card, NamedCard, is_card_file, read_card, shipped_cards
from d2lora.data.formats import (
    FORMATS,
    PROMPTS,
    Conversation,
    Format,
    FormatsSeen,
    format_of,
    given,
    missing,
)
from d2lora.data.paths import EVERY, as_text, column_of, value_at
from d2lora.data.preferences import PREFERENCES, read_preference
from d2lora.data.rows import BadRowError, Example, Fault, Message, place
from d2lora.data.sources import Row, check_different, stream_source
from d2lora.data.templates import Template
from d2lora.errors import DataError, counted, listed

Answers = Literal["open", "closed", "pairs", "none"]
AUTO = "auto"
_DEFAULT_METRICS = {
    "open": ("rouge",),
    "closed": ("accuracy", "macro_f1"),
}
_NUMBERED = "gsm8k"
"""The metric whose targets must end in a number."""

Fields = Mapping[str, Any]
Reader = Callable[[Fields], Example]
Say = Callable[[str], None]
Check = Callable[[Example], None]


_LABELS = frozenset(
    "label labels label_text label_name class target targets sentiment intent summary answer "
    "answers output response completion translation category stars rating score polarity topic "
    "emotion".split()
)
"""Fields that are labels where they stand beside `text`."""


@dataclass(frozen=True)
class Task:
    """How rows are read and how outputs are scored."""

    named: NamedCard

    @property
    def name(self) -> str:
        """The card's name."""
        return self.named.name

    @property
    def card(self) -> Card:
        """Its card."""
        return self.named.card

    @property
    def answers(self) -> Answers:
        """How its test rows are answered; of documents `none`."""
        return "none" if self.card.prompt == "" else self.card.answers

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what outputs are scored by, the main one first; empty where there are none."""
        return self.card.metrics or _DEFAULT_METRICS.get(self.answers, ())

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """What its rows may look like; by the last one, where a row has not all of its fields."""
        card, templates = self.card, self.named.templates
        columns = [column_of(path) for path in card.columns.values()]
        shown = [c for t in templates.values() for c in t.columns if c not in card.columns]
        if card.references not in (None, SAME_PROMPT):
            shown.append(column_of(str(card.references)))
        if columns or "prompt" in templates or card.prompt == "":
            return (Format(self.name, tuple(dict.fromkeys([*columns, *shown]))),)
        known = (PREFERENCES,) if self.answers == "pairs" else (*FORMATS, *PROMPTS)
        return tuple(replace(form, reads=(*form.reads, *shown)) for form in known)

    def read(self, row: Fields) -> Example:
        """Read a row.

        Raises:
            BadRowError: If it does not hold what the card needs.
        """
        example = self._read(row, answered=True)
        if self.card.labels and example.completion not in self.card.labels:
            raise BadRowError(
                f"the answer {example.completion!r:.60} is none of the "
                f"{len(self.card.labels)} labels ({self.named.place('labels')})"
            )
        if _NUMBERED in self.metrics and (fault := target_fault(example.completion)):
            raise BadRowError(fault)
        return example

    def ask(self, row: Fields) -> Example:
        """Read the prompt of a row alone; an answer beside it is not needed.

        Raises:
            BadRowError: If it does not hold what the card needs.
        """
        return replace(self._read(row, answered=False), completion="", rejected=None, references=())

    def _read(self, row: Fields, *, answered: bool) -> Example:
        templates, row = self.named.templates, self._named(row)
        values = {**row, **self._columns(row, answered=answered)}
        if self.card.prompt is None:
            example = self._recognized(row, values, answered=answered)
        else:
            prompt = ()
            if "prompt" in templates:
                prompt = self._prompt(templates["prompt"], values)
            completion = self._completion(values) if answered or not prompt else ""
            example = Example(prompt, completion)
        if "system" in templates and not any(turn.role == "system" for turn in example.prompt):
            system = Message("system", self._filled("system", values).text)
            example = replace(example, prompt=(system, *example.prompt))
        return replace(example, references=self._references(row)) if answered else example

    def _columns(self, row: Fields, *, answered: bool) -> dict[str, Any]:
        """Return the fields that the card names; without an answer those that are there."""
        named: dict[str, Any] = {}
        for name, path in self.card.columns.items():
            try:
                value = value_at(row, path)
            except BadRowError as error:
                if answered:
                    raise self._placed(error, "columns") from None
            else:
                if isinstance(value, list) and EVERY in path and not _has_objects(value):
                    named[name] = "\n".join(map(as_text, value))
                else:
                    named[name] = value if isinstance(value, list | dict) else as_text(value)
        return named

    def _named(self, row: Fields) -> Fields:
        """Return a row with the names that the card gives to values of its columns."""
        own: dict[str, Any] = {}
        for column, names in self.card.values.items():
            if row.get(column) is None:
                continue
            value = as_text(row[column])
            if value not in names:
                raise BadRowError(
                    f"field `{column}` is {value!r:.60}, which is none of {', '.join(names)}; "
                    f"{self.named.place('values')} names these"
                )
            own[column] = names[value]
        return {**row, **own}

    def _recognized(self, row: Fields, values: Fields, *, answered: bool) -> Example:
        """Read a row in a format that is known by its fields."""
        own = {name: values[name] for name in self.card.columns if name in values}
        own = own if self.card.columns else dict(row)
        if answered and "completion" in self.named.templates:
            own["completion"] = self._completion(values)
        if self.answers == "pairs":
            return read_preference(own)
        known = format_of(FORMATS if answered else PROMPTS, own)
        if not isinstance(known, Conversation):
            raise BadRowError(missing(own))
        if str(own.get("label")).lower() == "false":
            raise BadRowError(
                "`label` is false: as in KTO, this answer is one to avoid; leave such rows out, or "
                "pair them with better answers as `chosen` and `rejected`"
            )
        return known.read(own)

    def _prompt(self, template: Template, values: Fields) -> tuple[Message, ...]:
        """Return the turn of the template; a field that holds turns, as these."""
        turns = values.get(template.paths[0]) if template.is_field else None
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return given(values, template.paths[0])
        filled = self._filled("prompt", values)
        return (Message("user", filled.text, fields=filled.fields),)

    def _completion(self, values: Fields) -> str:
        template = self.named.templates.get("completion", Template.of("{completion}"))
        try:
            return template.fill(values).text
        except BadRowError as error:
            raise self._placed(error, "completion") from None

    def _filled(self, name: str, values: Fields) -> Any:
        try:
            return self.named.templates[name].fill(values)
        except BadRowError as error:
            raise self._placed(error, name) from None

    def _placed(self, error: BadRowError, setting: str) -> BadRowError:
        if self.named.path is None:
            return error
        return BadRowError(f"{error}; {self.named.place(setting)} needs it")

    def _references(self, row: Fields) -> tuple[str, ...]:
        path = self.card.references
        if path is None or path == SAME_PROMPT:
            return ()
        try:
            value = value_at(row, path)
        except BadRowError as error:
            raise self._placed(error, "references") from None
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            error = BadRowError(f"field `{path}` must be a text or a list of texts")
            raise self._placed(error, "references")
        return tuple(texts)


def _has_objects(values: Sequence[Any]) -> bool:
    return any(isinstance(value, list | dict) for value in values)


@cache
def _shipped(name: str) -> Task:
    return Task(read_card(name))


def _detected(row: Fields) -> Task:
    """Return the card that ships and knows a row by the most fields, else that of instructions."""
    fields = {name: str(value) for name, value in row.items() if value is not None}
    tasks = (_shipped(name) for name in shipped_cards())
    by_fields = sorted((t for t in tasks if t.card.detect), key=lambda t: -len(t.card.detect))
    for task in by_fields:
        detect = task.card.detect
        if len(detect) == 1 and format_of(PROMPTS, row) is not None:
            break  # as a field beside a question it says little
        if all(name in fields and text in fields[name] for name, text in detect.items()):
            return task
    return _shipped("instruct")


def is_closed(name: str) -> bool:
    """Say whether a task, as it is named in settings, has closed answers."""
    return name != AUTO and task_of(name, {}).answers == "closed"


def header_of(name: str) -> tuple[str, ...]:
    """Return the columns of files without a header, as the card of a task names them."""
    return task_of(name, {}).card.header if is_card_file(name) else ()


def task_of(name: str, first_row: Fields) -> Task:
    """Return the task named, or (`auto`) the one detected from the first row's fields.

    Raises:
        D2LoraError: If a card cannot be read.
    """
    if name == AUTO:
        return _detected(first_row)
    return Task(read_card(name)) if is_card_file(name) else _shipped(name)


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
        self,
        names: Sequence[str],
        task_name: str,
        say: Say | None = None,
        check: Check | None = None,
        *,
        prompts_only: bool = False,
    ) -> None:
        """Name what to read.

        Args:
            names: Files or hub data sets.
            task_name: As for `task_of`; `auto` looks at the first row of all.
            say: Gets a message per source: the formats of its rows, and the fields not used.
            check: Raises `BadRowError` for an example that cannot be used.
            prompts_only: Read prompts alone; answers beside them are not needed.

        Raises:
            DataError: If there are no names, or one is given twice.
        """
        if not names:
            raise DataError("no data: give --data one or more files or hub data sets")
        check_different(names)
        self._names, self._task_name, self._say, self._check = names, task_name, say, check
        self._prompts_only = prompts_only
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
            header = header_of(self._task_name)
            stream, n_rows, seen = stream_source(name, header), 0, FormatsSeen(name)
            for item in stream.items:
                if isinstance(item, Fault):
                    self.faults.append(item)
                    continue
                n_rows += 1
                self.task = self.task or task_of(self._task_name, item.values)
                try:
                    read = self.task.ask if self._prompts_only else self.task.read
                    example = read(item.values)
                    if self._check is not None:
                        self._check(example)
                except BadRowError as error:
                    self.faults.append(item.fault(error))
                else:
                    new = seen.add(self.task.formats, item.values)
                    if self.task.answers == "none" and self._task_name == AUTO:
                        _refuse_labels(name, new)
                    where = place(item.file, item.line)
                    yield item, replace(example, row=n_good, place=where)
                    n_good += 1
            seen.report(self._say)
            source = {"file": stream.name, "rows": n_rows, "sha256": stream.fingerprint()}
            self.sources.append(source)

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
    task_name: str = AUTO,
    *,
    skip_bad: bool = False,
    say: Say | None = None,
    check: Check | None = None,
    prompts_only: bool = False,
) -> TaskData:
    """Read sources as examples of one task.

    Args:
        names: Files or hub data sets.
        task_name: As for `task_of`.
        skip_bad: Return bad rows as `faults` instead of raising.
        say: As for `Reading`.
        check: As for `Reading`.
        prompts_only: As for `Reading`.

    Raises:
        DataError: If a source cannot be read, no row is left, or rows are bad; all at once.
    """
    reading = Reading(names, task_name, say, check, prompts_only=prompts_only)
    rows: list[Row] = []
    examples: list[Example] = []
    for row, example in reading:
        rows.append(row)
        examples.append(example)
    return reading.data(examples, rows, skip_bad=skip_bad)


def with_references(data: TaskData) -> TaskData:
    """Return test rows with equal prompts as one, the answers of all as its references.

    Only where the card says so; the first row's answer is the target.
    """
    if data.task.card.references != SAME_PROMPT:
        return data
    groups: dict[tuple[Message, ...], list[int]] = {}
    for index, example in enumerate(data.examples):
        groups.setdefault(example.prompt, []).append(index)
    examples: list[Example] = []
    for row, group in enumerate(groups.values()):
        first, *others = (data.examples[index] for index in group)
        answers = tuple(other.completion for other in others)
        examples.append(replace(first, row=row, references=answers))
    rows = [data.rows[group[0]] for group in groups.values()]
    return replace(data, examples=examples, rows=rows)


def answers_of(task: Task, example: Example) -> list[Example]:
    """Return what is learnt of an example: its answer, or each of its turns as one.

    An answer that calls a tool is not among them.
    """
    if task.card.turns == "last":
        return [example]
    earlier = [
        replace(example, prompt=example.prompt[:place], completion=turn.content)
        for place, turn in enumerate(example.prompt)
        if turn.role == "assistant" and place and not turn.of_tools
    ]
    return [*earlier, example]


def labels_of(data: TaskData) -> tuple[str, ...]:
    """Return the labels of closed answers: those that the card lists, else all of the rows."""
    return data.task.card.labels or tuple(sorted({e.completion for e in data.examples}))


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
