"""Reading sources as rows of one task: examples, raw rows, bad rows, all faults at once."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from d2lora.data.cards import SAME_PROMPT
from d2lora.data.formats import FormatsSeen
from d2lora.data.rows import BadRowError, Example, Fault, Message, place
from d2lora.data.sources import Row, check_different, stream_source
from d2lora.data.spool import Lazy, Spool
from d2lora.data.tasks import AUTO, Fields, Task, layout_of, task_of
from d2lora.errors import DataError, counted, listed

Say = Callable[[str], None]
Check = Callable[[Example], None]
_LABELS = frozenset(
    "label labels label_text label_name class target targets sentiment intent summary answer "
    "answers output response completion translation category stars rating score polarity topic "
    "emotion".split()
)
"""Fields that are labels where they stand beside `text`."""


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
        n_good, layout = 0, layout_of(self._task_name)
        for name in self._names:
            stream, n_rows, seen = stream_source(name, layout), 0, FormatsSeen(name)
            for item in stream.items:
                if isinstance(item, Fault):
                    self.faults.append(item)
                    continue
                n_rows += 1
                task = self._task_of(item.values)
                self.task = self.task or task
                try:
                    read = task.ask if self._prompts_only else task.read
                    example = read(item.values)
                    if self._check is not None:
                        self._check(example)
                except BadRowError as error:
                    self.faults.append(item.fault(error))
                else:
                    known = task.prompts if self._prompts_only else task.formats
                    new = seen.add(known, item.values)
                    if task.answers == "none" and self._task_name == AUTO:
                        _refuse_labels(name, new)
                    where = place(item.file, item.line)
                    yield item, replace(example, row=n_good, place=where)
                    n_good += 1
            seen.report(self._say)
            source = {"file": stream.name, "rows": n_rows, "sha256": stream.fingerprint()}
            self.sources.append(source)

    def _task_of(self, row: Fields) -> Task:
        """Return the task of a row: that of the first; of prompts alone, which are as they are."""
        if self.task is None or (self._prompts_only and self._task_name == AUTO):
            return task_of(self._task_name, row)
        return self.task

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


def read_pool(
    names: Sequence[str],
    task_name: str = AUTO,
    *,
    skip_bad: bool = True,
    say: Say | None = None,
    check: Check | None = None,
) -> TaskData:
    """Read sources as `read_task` does, rows and examples staying on disk; see `spool`.

    Args:
        names: Files or hub data sets.
        task_name: As for `task_of`.
        skip_bad: As for `read_task`.
        say: As for `Reading`.
        check: As for `Reading`.

    Raises:
        DataError: As `read_task`.
    """
    reading = Reading(names, task_name, say, check)
    lines = Spool(
        json.dumps([row.values, row.file, row.line], default=str, separators=(",", ":"))
        for row, _ in reading
    )

    def row_of(number: int) -> Row:
        return Row(*json.loads(lines[number]))

    def example_of(number: int) -> Example:
        assert reading.task is not None
        row = row_of(number)
        return replace(reading.task.read(row.values), row=number, place=row.place)

    numbers = range(len(lines))
    return reading.data(Lazy(example_of, numbers), Lazy(row_of, numbers), skip_bad=skip_bad)


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


def labels_of(data: TaskData) -> tuple[str, ...]:
    """Return the labels that answers are chosen from: the card's, else those of the rows."""
    if not data.task.has_labels:
        return ()
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
