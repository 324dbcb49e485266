"""Task cards: how the rows of a task are read, shown and scored, as data.

A card is a YAML file beside the data, or the name of one that ships (`d2lora/tasks`). Rows whose
columns it does not name are read as any of `formats.FORMATS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from d2lora.data.formats import FORMATS
from d2lora.data.options import Choices
from d2lora.data.paths import EVERY, steps_of
from d2lora.data.preferences import PREFERENCES
from d2lora.data.rows import repeated
from d2lora.data.templates import Template
from d2lora.errors import DataError, SettingsError, did_you_mean
from d2lora.settings import Settings
from d2lora.settings.yaml_text import parse_yaml

SAME_PROMPT = "same prompt"
Answers = Literal["open", "closed", "pairs"]


class Card(Settings):
    """A task as data."""

    detect: dict[str, str] = Field(default_factory=dict)
    """Fields by which rows of `task: auto` are known to be of this card, each with a text that it
    must hold. Used for the cards that ship."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Name -> column or path (`QUESTION`, `answers[0].text`, `CONTEXTS[*]`). Without templates the
    names are `prompt` and `completion`, or those of any format that is recognized."""
    values: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Column, or name or path of `columns` and templates -> its values by the names to show, as in
    `{label: {0: no, 1: yes}}`."""
    header: tuple[str, ...] = ()
    """Names of the columns of CSV and TSV files that have no header."""
    rows: str = ""
    """Path to the rows within what a file holds, as in `paragraphs[*].qas[*]`; each gets the fields
    around it. Empty: what the file holds one of is a row."""
    system: str = ""
    """Template of a system turn, for rows that have none of their own."""
    prompt: str | None = None
    """Template of the prompt. None: as in the columns. Empty: no prompt, the completion is a
    document of which every token is learnt."""
    completion: str | None = None
    """Template of the answer. None: `{completion}`."""
    references: str | tuple[str, ...] | None = None
    """Further right answers of a test row: a path to a text or a list, or several paths, of which
    those without a value are left out; or `same prompt`: rows with equal prompts are one, with all
    their answers."""
    answers: Answers = "open"
    """open: generated; closed: the likeliest of the labels; pairs: `chosen` and `rejected`, and the
    likelier one counts."""
    labels: tuple[str, ...] = ()
    """The labels of closed answers. Empty: the answers of the training rows."""
    choices: Choices | None = None
    """What closed answers are chosen from, where each row brings its own choices. None: labels."""
    metrics: tuple[str, ...] = ()
    """Names of metrics, the main one first, or `file.py:function` of one's own, found from the
    card's folder. Empty: rouge of open answers, accuracy and macro_f1 of labels, accuracy
    of choices."""
    turns: Literal["last", "every"] = "last"
    """Of a conversation, what is learnt: the last answer, or every answer, each from the turns
    before it."""
    thoughts: str = ""
    """What opens and closes thoughts, as in `<think> </think>`: outputs are scored without them.
    Empty: outputs are scored whole."""

    @field_validator("columns")
    @classmethod
    def _paths(cls, columns: dict[str, str]) -> dict[str, str]:
        for path in columns.values():
            steps_of(path)
        return columns

    @field_validator("header")
    @classmethod
    def _named_once(cls, header: tuple[str, ...]) -> tuple[str, ...]:
        if twice := repeated(header):
            raise ValueError(f"{twice} is named more than once")
        return header

    @field_validator("rows")
    @classmethod
    def _leads_to_rows(cls, path: str) -> str:
        steps = steps_of(path) if path else [EVERY]
        if steps[-1] != EVERY or any(isinstance(step, int) for step in steps):
            raise ValueError(f"{path!r} leads to no rows: write names and lists, as in `qas[*]`")
        return path

    @field_validator("system", "prompt", "completion")
    @classmethod
    def _templates(cls, text: str | None) -> str | None:
        Template.of(text or "")
        return text

    @model_validator(mode="after")
    def _reference(self) -> "Card":
        for path in self.reference_paths:
            steps_of(path)
        if SAME_PROMPT in self.reference_paths:
            raise ValueError(f"`references`: `{SAME_PROMPT}` stands alone, without other paths")
        return self

    @property
    def reference_paths(self) -> tuple[str, ...]:
        """Paths to further right answers within a row."""
        if self.references is None or self.references == SAME_PROMPT:
            return ()
        return (self.references,) if isinstance(self.references, str) else self.references

    @field_validator("labels")
    @classmethod
    def _different(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        stripped = tuple(label.strip() for label in labels)
        if twice := repeated(stripped):
            raise ValueError(f"{twice} is given more than once")
        return stripped

    @field_validator("prompt", "completion")
    @classmethod
    def _shows_a_field(cls, text: str | None, info: ValidationInfo) -> str | None:
        constant = text and not Template.of(text).paths
        if constant and (info.field_name == "completion" or len(str(text).split()) == 1):
            raise ValueError(f"it shows no field; write the name of one in braces: {{{text}}}")
        return text

    @field_validator("thoughts")
    @classmethod
    def _two_marks(cls, thoughts: str) -> str:
        if thoughts and len(thoughts.split()) != 2:
            raise ValueError("expected an opening and a closing mark, as in `<think> </think>`")
        return thoughts

    @model_validator(mode="after")
    def _fits(self) -> "Card":
        if self.turns == "every" and self.answers != "open":
            raise ValueError("turns: every is of `answers: open`")
        if self.labels and self.answers != "closed":
            raise ValueError("labels are of `answers: closed`")
        if self.choices is not None:
            self._check_choices(self.choices)
        if self.answers == "pairs" and not (self.prompt is None and self.completion is None):
            raise ValueError(
                "pairs have no templates: name their fields in `columns`, as in "
                "`columns: {prompt: x, chosen: y, rejected: z}`"
            )
        if self.metrics and (self.answers == "pairs" or self.prompt == ""):
            raise ValueError(
                "metrics are of answers, open or closed; pairs and documents have none"
            )
        if self.prompt == "" and self.completion is None:
            raise ValueError("a card without a prompt needs a `completion`")
        if self.prompt == "" and self.answers != "open":
            raise ValueError(f"answers: {self.answers} needs a prompt, and `prompt` is empty")
        if unknown := [name for name in self.values if name not in self._fields()]:
            raise ValueError(
                f"`values` names `{unknown[0]}`, which is not among the fields that the card shows"
                f".{did_you_mean(unknown[0], self._fields())}"
            )
        return self

    def _check_choices(self, choices: Choices) -> None:
        if self.answers != "closed":
            raise ValueError("choices are of `answers: closed`")
        if self.labels:
            raise ValueError("`choices` are each row's own, and `labels` those of all: give one")
        if self.references is not None:
            raise ValueError("one of the `choices` is right, so there are no `references`")
        if choices.right and self.completion is not None:
            raise ValueError(
                "the answer is the choice that `right` names, or what `completion` gives: leave "
                "one of the two out"
            )

    @property
    def right_of_choices(self) -> bool:
        """Whether the answer is a choice that the row names."""
        return self.choices is not None and bool(self.choices.right)

    def _fields(self) -> list[str]:
        """Return the names and paths of the fields that may be shown."""
        named = [*self.columns, *self.columns.values()]
        templates = (self.system, self.prompt, self.completion)
        shown = [path for text in templates for path in Template.of(text or "").paths]
        known = (PREFERENCES,) if self.answers == "pairs" else FORMATS
        recognized = [name for form in known for name in (*form.needs, *form.reads)]
        whole = self.prompt is not None and self.completion is not None
        shown += [*self.reference_paths, *(self.choices.paths if self.choices else ())]
        return [*named, *shown, *([] if whole else recognized)]


@dataclass(frozen=True)
class NamedCard:
    """A card, and where it was read."""

    name: str
    """Of a card that ships, or the file's name without its suffix."""
    card: Card
    path: Path | None
    """Its file; None for one that ships."""
    lines: Mapping[str, int]
    """The line of each setting."""

    def place(self, setting: str) -> str:
        """Return where a setting stands, for messages."""
        if self.path is None:
            return f"`{setting}` of the task {self.name}"
        line = self.lines.get(setting)
        return f"{self.path}, line {line}" if line else str(self.path)

    @property
    def folder(self) -> Path:
        """Folder from which files that it names are found."""
        return self.path.parent if self.path else Path()

    @cached_property
    def templates(self) -> dict[str, Template]:
        """Its templates by setting."""
        own = {name: getattr(self.card, name) for name in ("system", "prompt", "completion")}
        return {name: Template.of(text) for name, text in own.items() if text}


def shipped_cards() -> list[str]:
    """Return the names of the cards that ship, those that are detected first to last."""
    files = resources.files("d2lora").joinpath("tasks").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))


def is_card_file(name: str) -> bool:
    """Say whether a task is named by its card's file."""
    return Path(name).suffix.lower() in (".yaml", ".yml")


def read_card(name: str) -> NamedCard:
    """Read a card: a file, or one that ships.

    Raises:
        DataError: If a file cannot be read.
        SettingsError: If there is no such card, or it is not one; with every fault and its line.
    """
    if not is_card_file(name):
        known = shipped_cards()
        if name not in known:
            raise SettingsError(
                f"unknown task `{name}`.{did_you_mean(name, known)} Give a task card (a .yaml "
                f"file), `auto`, or one of {', '.join(known)}"
            )
        text = resources.files("d2lora").joinpath("tasks", f"{name}.yaml").read_text("utf-8")
        return _parsed(name, text, None)
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: a task card must be UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the task card: {error.strerror or error}") from None
    return _parsed(path.stem, text, path)


def _parsed(name: str, text: str, path: Path | None) -> NamedCard:
    where = str(path or name)
    try:
        values, lines = parse_yaml(text, texts=True), _lines(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: not a YAML file: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise SettingsError(f"{where}: expected `name: value` lines, found {found}")
    for field in ("header", "labels", "metrics"):
        if isinstance(values.get(field), str):
            values[field] = [values[field]]
    try:
        card = Card(**{str(key): value for key, value in values.items()})
    except SettingsError as error:
        faults = [_with_line(fault, lines) for fault in str(error).splitlines()[1:]]
        raise SettingsError(f"{where}: not a task card:\n" + "\n".join(faults)) from None
    return NamedCard(name, card, path, lines)


def _lines(text: str) -> dict[str, int]:
    node = yaml.compose(text, yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {str(key.value): key.start_mark.line + 1 for key, _ in pairs}


def _with_line(fault: str, lines: Mapping[str, int]) -> str:
    """Add the line of the setting that a fault names."""
    for name, line in lines.items():
        if f"`{name}`" in fault or f"`{name}." in fault:
            return f"{fault} (line {line})"
    return fault
