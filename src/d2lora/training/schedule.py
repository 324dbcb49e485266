"""Which rows each optimizer step sees, and at what learning rate. Pure functions of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from d2lora.errors import SettingsError
from d2lora.settings import TrainSettings

EPOCHS = 3
LEAST_STEPS = 100
"""Length of a run where no setting says it: passes over the rows, and optimizer steps at least."""


@dataclass(frozen=True)
class StepSchedule:
    """The optimizer steps of a run, known before it starts, so that any of them can be resumed."""

    n_rows: int
    batch_size: int
    n_steps: int
    """Optimizer steps of the schedule."""
    order_seed: int
    stop_step: int | None = None
    """Step to end after; None: the schedule's last."""
    steps_per_episode: int = 1
    """Steps behind which the weights are judged and kept; more in a meta warm-up alone."""

    @classmethod
    def of(cls, n_rows: int, settings: TrainSettings, order_seed: int) -> "StepSchedule":
        """Lay out the steps for a number of training rows."""
        batch_size = min(batch_size_of(n_rows, settings), n_rows)
        steps_per_epoch = math.ceil(n_rows / batch_size)
        steps = settings.max_steps
        if steps is None and settings.epochs is not None:
            steps = max(1, math.ceil(settings.epochs * steps_per_epoch))
        elif steps is None:
            steps = max(LEAST_STEPS, EPOCHS * steps_per_epoch)
        return cls(n_rows, batch_size, steps, order_seed, settings.stop_step)

    def until(self, n_tokens: int, tokens_of_rows: Sequence[int]) -> "StepSchedule":
        """Return this schedule with as many steps as it takes to see `n_tokens`."""
        seen = step = 0
        while seen < n_tokens:
            seen += sum(tokens_of_rows[row] for row in self.batch(step))
            step += 1
        return replace(self, n_steps=step)

    @property
    def last_step(self) -> int:
        """Step that the run ends with.

        Raises:
            SettingsError: If it is to end after its schedule does.
        """
        if self.stop_step is None:
            return self.n_steps
        if self.stop_step > self.n_steps:
            raise SettingsError(
                f"--stop-step {self.stop_step} is beyond the schedule's {self.n_steps} steps; "
                "give --max-steps the length of the schedule"
            )
        return self.stop_step

    def learning_rate(self, step: int, settings: TrainSettings) -> float:
        """Return the learning rate of optimizer step `step` (from 0)."""
        return learning_rate_at(step, self.n_steps, settings)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; the last batch of a pass may be smaller."""
        return math.ceil(self.n_rows / self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Return the rows of optimizer step `step` (from 0): one seeded shuffle per pass."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.n_rows, self.order_seed, epoch)
        start = position * self.batch_size
        return order[start : start + self.batch_size].tolist()


@lru_cache(maxsize=1)  # of a million rows it takes longer than a small step
def _order(n_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(n_rows)


def batch_size_of(n_rows: int, settings: TrainSettings) -> int:
    """Return the examples of an optimizer step: fewer where there are few, which then teach more.

    At 16 rows, 3 passes in batches of 16 are 3 steps, which leave an adapter nearly untrained.
    """
    if settings.batch_size is not None:
        return settings.batch_size
    return 4 if n_rows < 64 else 8 if n_rows < 256 else 16


def passes(n_rows: int, settings: TrainSettings) -> float:
    """Return how often a run shows each of its rows."""
    if settings.epochs is not None and settings.stop_step is None:
        return settings.epochs
    schedule = StepSchedule.of(max(1, n_rows), settings, 0)
    whole, more = divmod(schedule.last_step, schedule.steps_per_epoch)
    return whole + min(1.0, more * schedule.batch_size / schedule.n_rows)


def learning_rate_at(step: int, n_steps: int, settings: TrainSettings) -> float:
    """Return the learning rate of optimizer step `step` (from 0) out of `n_steps`.

    Rises linearly over the warm-up steps, then falls to zero linearly or along half a cosine. No
    step has learning rate zero, so none of a few is wasted.
    """
    n_warmup = math.ceil(settings.warmup_fraction * n_steps)
    if step < n_warmup:
        return settings.learning_rate * (step + 1) / (n_warmup + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    share = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * share
