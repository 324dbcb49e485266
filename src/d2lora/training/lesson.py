"""What a run learns: rows, the loss over them, and the steps in which they come."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from d2lora.data.batches import T
from d2lora.settings import TrainSettings, WarmupSettings
from d2lora.settings.seeds import seed_of
from d2lora.training.episodes import EpisodeSchedule
from d2lora.training.objectives import Objective
from d2lora.training.replay import Replay
from d2lora.training.schedule import StepSchedule, batch_size_of

_LOOKED_AT = 1024
"""Rows among which the longest are looked for."""


@dataclass(frozen=True)
class Lesson(Generic[T]):
    """What a run learns: rows, and the loss over them."""

    train: Sequence[T]
    valid: Sequence[T]
    """Rows for the validation loss; may be empty."""
    objective: Objective[T]
    pad_id: int
    max_tokens: int | None = None
    """End with the step that sees so many tokens, in place of the settings' end."""
    origins: Sequence[str] = ()
    """Of a meta warm-up: the source of each training row."""
    replay: Replay | None = None
    """General rows that are learnt beside them."""

    def schedule(self, settings: TrainSettings) -> StepSchedule:
        """Return the steps of a run, which ends as the settings say or with `max_tokens`."""
        schedule = StepSchedule.of(len(self.train), settings, seed_of(settings, "order"))
        if isinstance(settings, WarmupSettings) and settings.meta_steps is not None:
            schedule = EpisodeSchedule.of_sources(schedule, self.origins, settings)
        if self.max_tokens is None:
            return schedule
        return schedule.until(self.max_tokens, [item.n_tokens for item in self.train])

    def longest(self, settings: TrainSettings) -> list[T]:
        """Return a batch of the longest among the first rows."""
        first = self.train[:_LOOKED_AT]
        size = batch_size_of(len(self.train), settings)
        return sorted(first, key=lambda item: item.length, reverse=True)[:size]
