"""Meta warm-up: an adapter from which few steps on few rows go far.

The warm-up is cut into episodes, each a small task of its own: a few rows of one source, a few
steps of the optimizer and the schedule that a scarce task gets in phase 2. Behind each the weights
move from where it began a part of the way to where it ended, and the optimizer starts anew: Reptile
(Nichol, Achiam, Schulman 2018, arXiv 1803.02999, algorithm 1 with one task at a time). For LoRA see
Block et al., "Provable Meta-Learning with Low-Rank Adaptations" (NeurIPS 2025), where plain
training on all tasks at once is shown to be suboptimal.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from d2lora.errors import DataError, counted
from d2lora.settings import TrainSettings, WarmupSettings
from d2lora.training.schedule import StepSchedule, batch_size_of, learning_rate_at


@dataclass(frozen=True)
class EpisodeSchedule(StepSchedule):
    """The optimizer steps of a meta warm-up, episode by episode."""

    groups: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    """The rows of each source."""
    rows_per_episode: int = 1
    rate: float = 1.0
    """Share of the way that the first episode moves the weights; it falls linearly to zero."""

    @classmethod
    def of_sources(
        cls, plain: StepSchedule, sources: Sequence[str], settings: WarmupSettings
    ) -> "EpisodeSchedule":
        """Cut a schedule into whole episodes.

        Args:
            plain: The schedule of a plain warm-up of that length.
            sources: The source of each training row.
            settings: The warm-up's settings.

        Raises:
            DataError: If no source has two rows.
        """
        places: defaultdict[str, list[int]] = defaultdict(list)
        for row, source in enumerate(sources):
            places[source].append(row)
        groups = tuple(tuple(rows) for rows in places.values() if len(rows) > 1)
        if not groups:
            raise DataError(
                f"--meta-steps draws small tasks from the sources of the rows, and none of "
                f"{counted(len(places), 'source')} has two rows; name the sources in a field "
                "`source`, or give a file for each"
            )
        assert settings.meta_steps is not None
        n_rows = min(settings.meta_rows, max(map(len, groups)))
        made = cls(
            plain.n_rows,
            min(batch_size_of(n_rows, settings), n_rows),
            plain.n_steps,
            plain.order_seed,
            plain.stop_step,
            settings.meta_steps,
            groups,
            n_rows,
            settings.meta_rate,
        )
        return made.in_whole_episodes()

    def in_whole_episodes(self) -> "EpisodeSchedule":
        """Return it with its last episode whole."""
        n_episodes = -(-self.n_steps // self.steps_per_episode)
        return replace(self, n_steps=n_episodes * self.steps_per_episode)

    def until(self, n_tokens: int, tokens_of_rows: Sequence[int]) -> "EpisodeSchedule":
        """Return this schedule with as many episodes as it takes to see `n_tokens`."""
        seen = step = 0
        while seen < n_tokens:
            seen += sum(tokens_of_rows[row] for row in self.batch(step))
            step += 1
        return replace(self, n_steps=step).in_whole_episodes()

    def batch(self, step: int) -> list[int]:
        """Return the rows of optimizer step `step` (from 0).

        An episode's source is drawn by its number of rows, so that all rows are as likely.
        """
        episode, inner = divmod(step, self.steps_per_episode)
        draw = np.random.default_rng((self.order_seed, episode))
        sizes = np.array([len(group) for group in self.groups], dtype=float)
        group = self.groups[int(draw.choice(len(self.groups), p=sizes / sizes.sum()))]
        rows = draw.permutation(np.array(group))[: self.rows_per_episode]
        order_seed = int(draw.integers(2**32))
        own = StepSchedule(len(rows), min(self.batch_size, len(rows)), 0, order_seed)
        return [int(rows[place]) for place in own.batch(inner)]

    def learning_rate(self, step: int, settings: TrainSettings) -> float:
        """Return the learning rate of a step: each episode has the whole schedule of phase 2."""
        return learning_rate_at(step % self.steps_per_episode, self.steps_per_episode, settings)

    def moves_after(self, step: int) -> float | None:
        """Return the share of the way to move after so many steps; None within an episode."""
        episode, inner = divmod(step, self.steps_per_episode)
        if inner:
            return None
        return self.rate * (1 - (episode - 1) / (self.n_steps // self.steps_per_episode))
