"""Task-shaped warm-up: general rows laid out as small tasks.

Before a row's prompt stand some rows of its source with their answers, as worked examples stand in
a few-shot prompt, so that what is learnt is to do as the examples do: MetaICL (Min et al. 2022,
arXiv 2110.15943), which always shows the same number; here it is drawn for each row, none included,
so that prompts without examples are learnt, too. Only the row's own answer counts in the loss.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from d2lora.data.encode import Encoder
from d2lora.data.rows import Example
from d2lora.data.shots import showing
from d2lora.data.spool import Lazy, Spool
from d2lora.errors import DataError
from d2lora.settings import WarmupSettings
from d2lora.settings.seeds import seed_of


class Shaper:
    """Shows training rows before rows of their source."""

    def __init__(
        self,
        encoder: Encoder,
        examples: Sequence[Example],
        sources: Sequence[str],
        settings: WarmupSettings,
    ) -> None:
        """Take the training rows, which alone are shown, and their sources."""
        self._encoder, self._examples = encoder, examples
        self._places: defaultdict[str, list[int]] = defaultdict(list)
        for place, source in enumerate(sources):
            self._places[source].append(place)
        self._n_shots = settings.shots
        self._limit = min(settings.max_length, encoder.n_positions)
        self._seed = seed_of(settings, "subset")
        self._n_rows = self._n_shown = 0

    def every(self, rows: Sequence[Example], sources: Sequence[str], part: int) -> Lazy[Example]:
        """Return rows with up to as many worked examples before them as settings and length allow.

        Args:
            rows: The rows.
            sources: Their sources.
            part: A number of the set of rows, from which they are drawn with the seed.

        Raises:
            DataError: If no row has a prompt to show examples before.
        """
        if not any(row.prompt for row in rows):
            raise DataError(
                "--shots shows rows before the prompts of others, and these rows are documents "
                "without prompts; leave it out"
            )
        both = enumerate(zip(rows, sources, strict=True))
        return Spool(self._shaped(row, source, (part, n)) for n, (row, source) in both).all()

    def report(self) -> str:
        """Return a message on the rows laid out so far."""
        mean = self._n_shown / self._n_rows
        return f"task-shaped: {mean:.1f} rows of the same source before a prompt on average"

    def _shaped(self, row: Example, source: str, key: tuple[int, int]) -> Example:
        draw = np.random.default_rng((self._seed, *key))
        n_shots = int(draw.integers(self._n_shots + 1))
        self._n_rows += 1
        if not n_shots or not row.prompt:
            return row
        # One of them may be the row itself; of others that ask the same one more is left out.
        order = draw.permutation(np.array(self._places[source], dtype=int))[: n_shots + 1]
        others = (self._examples[int(place)] for place in order)
        shots = [shot for shot in others if shot.prompt and shot.prompt != row.prompt][:n_shots]
        whole = self._encoder.encode(row)
        limit = self._limit - whole.n_supervised
        if not shots or whole.length > self._limit:
            return row
        shaped, n_shown = showing(self._encoder, row, shots, limit)
        self._n_shown += n_shown
        return shaped
