"""Multiple-choice questions: what their rows hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2lora.data.formats import Format, FormatsSeen
from d2lora.data.reading import Say, check_faults
from d2lora.data.rows import BadRowError, Fault, text_field
from d2lora.data.sources import Row, check_different, read_source


@dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question; `answer` is the index of the right choice."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    benchmark: str = ""


def read_choice_question(row: Mapping[str, Any]) -> ChoiceQuestion:
    """Read `prompt`, `choices` and `answer` (an index from 0)."""
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadRowError("field `choices` must be a list of at least two texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise BadRowError("each of `choices` must be text that is not empty")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise BadRowError(
            f"field `answer` must be an index from 0 to {len(choices) - 1}, got {answer!r}"
        )
    benchmark = row.get("benchmark", "")
    named = benchmark if isinstance(benchmark, str) else ""
    return ChoiceQuestion(text_field(row, "prompt"), tuple(choices), answer, named)


_CHOICE = Format("multiple choice", ("prompt", "choices", "answer"), ("benchmark",))


@dataclass(frozen=True)
class ChoiceData:
    """Multiple-choice questions and their raw rows, the sources' manifest and the bad rows."""

    questions: list[ChoiceQuestion]
    rows: list[Row]
    sources: list[dict[str, Any]]
    faults: list[Fault]


def read_choice_questions(
    names: Sequence[str], *, skip_bad: bool = False, say: Say | None = None
) -> ChoiceData:
    """Read multiple-choice questions; `say` gets a message on fields not used.

    Raises:
        DataError: As `read_task`.
    """
    check_different(names)
    choices: list[ChoiceQuestion] = []
    rows: list[Row] = []
    sources: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for source in map(read_source, names):
        faults += source.faults
        sources.append(source.manifest())
        seen = FormatsSeen(source.name)
        for row in source.rows:
            try:
                choices.append(read_choice_question(row.values))
            except BadRowError as error:
                faults.append(row.fault(error))
            else:
                rows.append(row)
                seen.add((_CHOICE,), row.values)
        seen.report(say)
    check_faults(faults, len(choices), skip_bad=skip_bad)
    return ChoiceData(choices, rows, sources, faults)
