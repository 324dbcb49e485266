"""What a fit finds."""

from dataclasses import dataclass, field
from typing import Any

from d2lora.data.reading import TaskData
from d2lora.fitting.compare import Answers, LearningCurve
from d2lora.fitting.jobs import AveragedWhole, InterpolatedWhole, Trained
from d2lora.fitting.ledger import Ledger
from d2lora.settings import AdaptSettings
from d2lora.study.tuning import Tuned


@dataclass(frozen=True)
class Tried:
    """A learning rate and length that were tried."""

    learning_rate: float
    n_steps: int
    """Length of the schedule."""
    n_folds: int
    step: int
    """Of the lowest loss."""
    loss: float


@dataclass(frozen=True)
class Contender:
    """What one initialization came to."""

    name: str
    tuned: Tuned
    tried: list[Tried]
    answers: Answers | None = None
    """To the rows held out. None: there was no time."""


@dataclass(frozen=True)
class Longer:
    """Training to the end of the schedule, against the step of the lowest loss."""

    whole: Contender
    stopped: Contender

    @property
    def kept(self) -> bool:
        """Whether it answers better, by the task's own score."""
        assert self.whole.answers is not None
        assert self.stopped.answers is not None
        change = self.whole.answers.change_from(self.stopped.answers)
        return change is not None and change.low > 0


@dataclass(frozen=True)
class Soup:
    """The average of several runs against one of them, on rows held out."""

    n_runs: int
    average: Answers
    single: Answers
    """The mean of the runs."""

    @property
    def kept(self) -> bool:
        """Whether the average does not lose."""
        return not self.single.beats(self.average)


@dataclass(frozen=True)
class Interpolation:
    """Points on the way from the initialization to the trained adapter, on rows held out."""

    tried: dict[float, Answers]
    """Share of the way -> answers."""
    end: Answers
    """Of the trained adapter."""

    @property
    def best(self) -> float:
        """The share of those tried that has the lowest loss."""
        return min(self.tried, key=lambda share: self.tried[share].loss)

    @property
    def kept(self) -> bool:
        """Whether the best of them beats the trained adapter."""
        return self.tried[self.best].beats(self.end)


@dataclass(frozen=True)
class Fitted:
    """What a fit found."""

    data: TaskData
    """The n rows."""
    candidates: list[Contender]
    winner: Contender
    prompted: dict[str, Answers]
    """Name -> the base with and without examples in its prompt."""
    longer: Longer | None
    soup: Soup | None
    interpolation: Interpolation | None
    runs: list[AdaptSettings]
    """The final runs on all n rows."""
    adapter: Trained | AveragedWhole | InterpolatedWhole
    curve: LearningCurve | None
    tests: dict[str, dict[str, Any]]
    """Name -> what was measured on test rows, general text and multiple choice."""
    ledger: Ledger = field(repr=False)

    @property
    def share(self) -> float:
        """How much of the way from the initialization the adapter goes."""
        one = self.interpolation
        return one.best if one is not None and one.kept else 1.0

    @property
    def answers(self) -> Answers | None:
        """What an adapter made as the final one answers to the rows held out."""
        if self.interpolation is not None and self.interpolation.kept:
            return self.interpolation.tried[self.share]
        return (
            self.soup.average if self.soup is not None and self.soup.kept else self.winner.answers
        )
