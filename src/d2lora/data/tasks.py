"""Tasks: rows as their card says, see `cards`.

A task is named, a card's file, or detected from the fields of its first row. What a prompt holds is
written down in the card, because a score without its prompt cannot be compared
(lm-evaluation-harness#2034).
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

from d2lora.data.answers import target_fault
from d2lora.data.cards import Card, NamedCard, is_card_file, read_card, shipped_cards
from d2lora.data.formats import (
    FORMATS,
    PROMPTS,
    Conversation,
    Format,
    format_of,
    given,
    missing,
)
from d2lora.data.options import NO_OPTIONS, options_of
from d2lora.data.paths import Items, as_text, column_of, value_at
from d2lora.data.preferences import PREFERENCES, read_preference
from d2lora.data.references import references_of
from d2lora.data.rows import PLAIN, BadRowError, Example, Layout, Message
from d2lora.data.templates import Template

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
    def has_labels(self) -> bool:
        """Whether answers are chosen from labels that all rows share."""
        return self.answers == "closed" and self.card.choices is None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what outputs are scored by, the main one first; empty where there are none."""
        default = ("accuracy",) if self.card.choices else _DEFAULT_METRICS.get(self.answers, ())
        return self.card.metrics or default

    @property
    def _answers_itself(self) -> bool:
        """Whether the card says what the answer is, and not the row's own form."""
        return "completion" in self.named.templates or self.card.right_of_choices

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """What its rows may look like; by the last one, where a row has not all of its fields."""
        card, templates = self.card, self.named.templates
        paths = [*card.columns.values()]
        filled = [path for template in templates.values() for path in template.paths]
        if card.prompt is not None and not self._answers_itself:
            filled.append("completion")
        filled += card.choices.paths if card.choices else ()
        paths += [path for path in filled if column_of(path) not in card.columns]
        paths += [p for p in card.reference_paths if column_of(p) not in card.columns]
        shown = list(dict.fromkeys(map(column_of, paths)))
        if card.columns or "prompt" in templates or card.prompt == "":
            whole = [path for path in card.columns.values() if path in shown]
            turned = whole if card.prompt is None else self._turned
            return (Format(self.name, tuple(paths), tuple(shown), tuple(turned)),)
        known = (PREFERENCES,) if self.answers == "pairs" else FORMATS
        if self._answers_itself:
            known = PROMPTS
        if not shown:
            return known
        return tuple(replace(form, reads=(*form.reads, *shown)) for form in known)

    @cached_property
    def _optional(self) -> set[str]:
        """Names that a template shows where they are there."""
        parts = [part for template in self.named.templates.values() for part in template.parts]
        return {str(part.path) for part in parts if part.optional}

    @property
    def _turned(self) -> list[str]:
        """Return the field that may hold the turns of the prompt."""
        template = self.named.templates.get("prompt")
        if template is None or not template.is_field:
            return []
        return [self.card.columns.get(path, path) for path in template.paths]

    @property
    def prompts(self) -> tuple[Format, ...]:
        """What rows may look like of which the prompt alone is read."""
        if self.formats[0] is FORMATS[0]:
            return PROMPTS
        return tuple(replace(f, needs=(), reads=(*f.needs, *f.reads)) for f in self.formats)

    def read(self, row: Fields) -> Example:
        """Read a row.

        Raises:
            BadRowError: If it does not hold what the card needs.
        """
        example = self._read(row, answered=True)
        if self.answers == "closed":
            example = replace(example, completion=example.completion.strip())
        if (own := example.choices) and example.completion not in own:
            raise BadRowError(
                f"the answer {example.completion!r:.60} is none of the {len(own)} choices of the "
                f"row ({self.named.place('choices')})"
            )
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
            BadRowError: If it does not hold what the card needs, or the card has no prompt.
        """
        if self.answers == "none":
            raise BadRowError(
                "a document has no prompt; name the task whose prompt is meant, as in "
                "`--task titles`"
            )
        return replace(self._read(row, answered=False), completion="", rejected=None, references=())

    def _read(self, row: Fields, *, answered: bool) -> Example:
        templates, columns = self.named.templates, self.card.columns
        row = {**row, **self._named(row, self.card.values.keys() - columns)}
        values = {**row, **self._columns(row, answered=answered)}
        values.update(self._named(values, self.card.values.keys() & columns))
        recognized = self.card.prompt is None
        if recognized:
            example = self._recognized(row, values, answered=answered)
        else:
            shown = "prompt" in templates
            example = Example(self._prompt(templates["prompt"], values) if shown else (), "")
        if answered or not example.prompt:
            with self._placed("choices"):
                own = options_of(values, self.card.choices) if self.card.choices else NO_OPTIONS
            if not recognized or self._answers_itself:
                right = own.right or self._completion(values)
                example = replace(example, completion=right, more={})
            with self._placed("references"):
                references = references_of(values, self.card.reference_paths)
            example = replace(example, references=references, choices=own.texts)
        if "system" in templates and not any(turn.role == "system" for turn in example.prompt):
            system = Message("system", self._filled("system", values).text)
            example = replace(example, prompt=(system, *example.prompt))
        return example

    def _columns(self, row: Fields, *, answered: bool) -> dict[str, Any]:
        """Return the fields that the card names; without an answer those that are there."""
        named: dict[str, Any] = {}
        for name, path in self.card.columns.items():
            needed = answered and name not in self._optional
            with self._placed("columns") if needed else suppress(BadRowError):
                named[name] = value_at(row, path)
        return named

    def _named(self, row: Fields, fields: Iterable[str]) -> dict[str, Any]:
        """Return those of the fields that are there, with the names that the card has for them."""
        named: dict[str, Any] = {}
        for field in fields:
            try:
                value = value_at(row, field)
            except BadRowError:
                continue
            named[field] = (
                type(value)(self._name(field, one) for one in value)
                if isinstance(value, list)
                else self._name(field, value)
            )
        return named

    def _name(self, field: str, value: Any) -> str:
        names = self.card.values[field]
        if as_text(value) not in names:
            raise BadRowError(
                f"field `{field}` is {as_text(value)!r:.60}, which is none of {', '.join(names)}; "
                f"{self.named.place('values')} names these"
            )
        return names[as_text(value)]

    def _recognized(self, row: Fields, values: Fields, *, answered: bool) -> Example:
        """Read a row in a format that is known by its fields."""
        own = {name: _field(values[name]) for name in self.card.columns if name in values}
        own = own if self.card.columns else dict(row)
        if self.answers == "pairs":
            return read_preference(own)
        whole = answered and not self._answers_itself
        known = format_of(FORMATS if whole else PROMPTS, own)
        if not isinstance(known, Conversation):
            raise BadRowError(missing(own))
        if whole and str(own.get("label")).lower() == "false":
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
        with self._placed("completion"):
            return template.fill(values).text

    def _filled(self, name: str, values: Fields) -> Any:
        with self._placed(name):
            return self.named.templates[name].fill(values)

    @contextmanager
    def _placed(self, setting: str) -> Generator[None]:
        """Name the line of a card's file in what is wrong with a row."""
        try:
            yield
        except BadRowError as error:
            if self.named.path is None:
                raise
            raise BadRowError(f"{error}; {self.named.place(setting)} needs it") from None


def _field(value: Any) -> Any:
    """Return a value as a format reads it: lists and objects as they are, others as text."""
    if isinstance(value, Items) and not any(isinstance(one, list | dict) for one in value):
        return "\n".join(map(as_text, value))
    return value if isinstance(value, list | dict) else as_text(value)


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


def has_labels(name: str) -> bool:
    """Say whether answers of a task, as settings name it, are chosen from labels of all rows."""
    return name != AUTO and task_of(name, {}).has_labels


def layout_of(name: str) -> Layout:
    """Return how rows lie in the files of a task."""
    if not is_card_file(name):
        return PLAIN
    card = task_of(name, {}).card
    return Layout(card.header, card.rows)


def task_of(name: str, first_row: Fields) -> Task:
    """Return the task named, or (`auto`) the one detected from the first row's fields.

    Raises:
        D2LoraError: If a card cannot be read.
    """
    if name == AUTO:
        return _detected(first_row)
    return Task(read_card(name)) if is_card_file(name) else _shipped(name)


def answers_of(task: Task, example: Example) -> list[Example]:
    """Return what is learnt of an example: its answer, or each of the assistant's turns."""
    if task.card.turns == "last":
        return [example]
    earlier = [
        replace(example, prompt=example.prompt[:place]).answered(turn)
        for place, turn in enumerate(example.prompt)
        if turn.role == "assistant" and turn.learnt and place
    ]
    return [*earlier, example]
