"""The runs of a fit, known by their content and kept in the store, as a study's are.

Each row of the task is held out once: an adapter trained without it answers it, and so does the
base with examples from the other rows in its prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d2lora.data.reading import TaskData, labels_of, read_task
from d2lora.data.rows import Example, Message
from d2lora.data.sources import nested_order, split_validation
from d2lora.settings import AdaptSettings, EvaluateSettings
from d2lora.settings.seeds import seed_of
from d2lora.study.averages import average, interpolate
from d2lora.study.jobs import adapted
from d2lora.study.store import Job, identity_of, shared_base


@dataclass(frozen=True)
class Split:
    """The n rows of a fit, and which of them a run leaves out; rows by their place among the n."""

    data: TaskData
    """The n rows, in the seeded order from which subsets and folds are cut."""
    trained: list[int]
    left: list[int]

    @classmethod
    def of(cls, settings: AdaptSettings, n: int) -> "Split":
        """Split n rows as a run with these settings does, which may train on fewer."""
        data = read_task(settings.data, settings.task, skip_bad=settings.skip_bad_rows)
        chosen = nested_order(len(data.examples), seed_of(settings, "subset"))[:n]
        examples = _with_answers(data, [data.examples[index] for index in chosen])
        data = replace(data, examples=examples, rows=[data.rows[index] for index in chosen])
        trained, _ = split_validation(range(settings.n or n), 0.0, settings.fold)
        return cls(data, trained, sorted(set(range(n)) - set(trained)))

    def rows(self, places: Sequence[int]) -> TaskData:
        """Return some of the rows as a task's data."""
        examples = [self.data.examples[place] for place in places]
        return replace(self.data, examples=examples, rows=[self.data.rows[p] for p in places])


def _with_answers(data: TaskData, examples: Sequence[Example]) -> list[Example]:
    """Add the answers of all rows of the same prompt, where the card says that they count."""
    if data.task.card.references != "same prompt":
        return list(examples)
    answers: dict[tuple[Message, ...], list[str]] = {}
    for example in data.examples:
        answers.setdefault(example.prompt, []).append(example.completion)
    return [replace(e, references=tuple(answers[e.prompt])) for e in examples]


@dataclass(frozen=True)
class Tuning(Job):
    """Common to the runs that answer rows which were held out."""

    training: AdaptSettings
    """Which rows are left out, and how an adapter is trained on the others."""
    tests: EvaluateSettings
    """How answers are made; without test rows."""
    n: int
    """Rows of the fit."""

    def identity(self) -> dict[str, Any]:
        """Return training and tests, by content."""
        return {
            "training": identity_of(self.training),
            "tests": identity_of(self.tests),
            "n": self.n,
        }

    def _answered(self, adapter: Path | None, shots: int = 0) -> dict[str, Any]:
        """Return the outputs of the rows left out, and the loss of their completions."""
        from d2lora.fitting.answers import answers_of

        split = Split.of(self.training, self.n)
        shown = [split.data.examples[place] for place in split.trained[:shots]]
        base = shared_base(self.training)
        left = split.rows(split.left)
        answers = answers_of(base, adapter, left, shown, labels_of(split.data), self.tests)
        return {"places": split.left, **answers}


@dataclass(frozen=True)
class HeldOut(Tuning):
    """An adapter trained without some of the rows, and what it answers to these."""

    @property
    def path(self) -> Path:
        """The adapter."""
        return self.folder / "adapter"

    def run(self) -> dict[str, Any]:
        """Train on the other rows, and answer these."""
        values = adapted(self.training, self.path)
        return {**values, **self._answered(self.path)}


@dataclass(frozen=True)
class Averaged(Tuning):
    """The average of adapters trained without the same rows in other orders, and its answers."""

    runs: tuple[HeldOut, ...] = ()

    @property
    def path(self) -> Path:
        """The adapter."""
        return self.folder / "adapter"

    def identity(self) -> dict[str, Any]:
        """Return the keys of the runs."""
        return {**super().identity(), "runs": [run.key for run in self.runs]}

    def run(self) -> dict[str, Any]:
        """Average the adapters, and answer the rows that none of them saw."""
        average([run.path for run in self.runs], self.path)
        return self._answered(self.path)


@dataclass(frozen=True)
class Interpolated(Tuning):
    """A point on the way from an initialization to what was trained without some of the rows."""

    end: HeldOut | Averaged
    share: float
    """Of the way; 1 is its end."""

    def identity(self) -> dict[str, Any]:
        """Return the key of the end, and the share."""
        return {**super().identity(), "end": self.end.key, "share": self.share}

    def run(self) -> dict[str, Any]:
        """Interpolate, and answer the rows left out."""
        path = self.folder / "adapter"
        interpolate(self.training.init, self.end.path, self.share, path)
        return self._answered(path)


@dataclass(frozen=True)
class Prompted(Tuning):
    """The base without an adapter, with some of the other rows in its prompt, or none."""

    shots: int = 0

    def identity(self) -> dict[str, Any]:
        """Return which rows are left out, and how many others are shown."""
        return {**super().identity(), "shots": self.shots}

    def run(self) -> dict[str, Any]:
        """Answer the rows left out."""
        return self._answered(None, self.shots)


@dataclass(frozen=True)
class Trained(Job):
    """An adapter trained on all n rows."""

    training: AdaptSettings

    @property
    def path(self) -> Path:
        """The adapter."""
        return self.folder / "adapter"

    def identity(self) -> dict[str, Any]:
        """Return the settings, by content."""
        return identity_of(self.training)

    def run(self) -> dict[str, Any]:
        """Train, or resume a killed run."""
        return adapted(self.training, self.path)


@dataclass(frozen=True)
class AveragedWhole(Job):
    """The average of adapters trained on all n rows."""

    runs: tuple[Trained, ...] = field(default=())

    @property
    def path(self) -> Path:
        """The adapter."""
        return self.folder / "adapter"

    def identity(self) -> dict[str, Any]:
        """Return the keys of the runs."""
        return {"runs": [run.key for run in self.runs]}

    def run(self) -> dict[str, Any]:
        """Average the adapters."""
        average([run.path for run in self.runs], self.path)
        return {}


@dataclass(frozen=True)
class InterpolatedWhole(Job):
    """A point on the way from an initialization to what was trained on all n rows."""

    end: Trained | AveragedWhole
    init: str
    share: float

    @property
    def path(self) -> Path:
        """The adapter."""
        return self.folder / "adapter"

    def identity(self) -> dict[str, Any]:
        """Return the key of the end, and the share."""
        return {"end": self.end.key, "share": self.share}

    def run(self) -> dict[str, Any]:
        """Interpolate."""
        interpolate(self.init, self.end.path, self.share, self.path)
        return {}
