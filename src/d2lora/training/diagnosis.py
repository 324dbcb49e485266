"""Warnings about a warm start and a warm-up, each with the numbers that it rests on.

`losses_at_start` alone looks at a model; the warnings are functions of numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from d2lora.data.batches import Encoded
from d2lora.errors import counted
from d2lora.evaluation.stats import paired_difference
from d2lora.scoring.scorer import TokenScorer, log_probabilities

MOST_ROWS = 32
"""Task rows that are measured before training; more would cost as much as a small task."""
LEAST_ROWS = 4
"""With fewer rows there is no warning."""
FEW_STEPS = 50
"""Optimizer steps below which a run is called short."""
RISE = 0.02
"""Share by which a held-out loss has to rise over its least before it is called overfitting."""


@dataclass(frozen=True)
class Start:
    """How the base and a warm start do on task rows before any training on them."""

    loss_base: float
    """Mean over rows of the base's loss on the completion, in nats per token."""
    loss_warm_start: float
    low: float
    """Of the 95 % CI, over rows, of the warm start's loss less the base's."""
    high: float
    n_rows: int

    @property
    def warning(self) -> str | None:
        """A warning that the warm start is worse than the base; None where rows do not show it."""
        if self.n_rows < LEAST_ROWS or self.low <= 0:
            return None
        return (
            f"the warm start is worse than the base on this task before training (loss "
            f"{self.loss_warm_start:.3f} against {self.loss_base:.3f} nats per token on "
            f"{self.n_rows} rows, 95 % CI of the difference {self.low:+.3f} to "
            f"{self.high:+.3f}): what it learnt does not transfer. Compare with --init fresh; try "
            "--init-scale 0.5, warm-up data closer to the task (d2lora select --for), or a warm-up "
            "with a lower learning rate or fewer epochs"
        )

    def __str__(self) -> str:
        """Return the numbers in a line."""
        return (
            f"before training, on {self.n_rows} task rows: loss {self.loss_base:.3f} (base), "
            f"{self.loss_warm_start:.3f} (warm start) nats per token"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain values, the warning with them."""
        return {**asdict(self), "warning": self.warning}


def losses_at_start(model: PeftModel, items: Sequence[Encoded], pad_id: int) -> Start:
    """Measure the base (adapter off) and the warm start (on) on at most `MOST_ROWS` task rows."""
    model.eval()
    shown = list(items[:MOST_ROWS])
    scorer = TokenScorer(model)
    with torch.no_grad():
        warm = _row_losses(scorer, shown, pad_id)
        with model.disable_adapter():
            base = _row_losses(scorer, shown, pad_id)
    worse = paired_difference(base[None], warm[None])
    return Start(float(base.mean()), float(warm.mean()), worse.low, worse.high, len(shown))


def _row_losses(scorer: TokenScorer, items: Sequence[Encoded], pad_id: int) -> Any:
    sums = log_probabilities(scorer, items, pad_id)
    return np.array([-s / max(1, item.n_supervised) for s, item in zip(sums, items, strict=True)])


def too_short(n_steps: int) -> str | None:
    """Return a warning on a short run; None where it is long enough, or trains nothing."""
    if not 0 < n_steps < FEW_STEPS:
        return None
    return (
        f"only {counted(n_steps, 'optimizer step')}, too few to train an adapter: give --max-steps "
        f"{FEW_STEPS} or more, more --epochs or a smaller --batch-size"
    )


def overfitting(
    before: float | None,
    best: float,
    best_step: int | None,
    last: float | None,
    n_steps: int,
    *,
    kept: bool = True,
) -> str | None:
    """Return a warning where a warm-up's held-out general loss rose or never fell; else None.

    Args:
        before: Held-out loss before the first step.
        best: Least held-out loss at a validation.
        best_step: Optimizer step of that validation.
        last: Held-out loss after the last step.
        n_steps: Steps taken.
        kept: Whether the best weights are kept, not the last.
    """
    if before is None or last is None or best_step is None:
        return None
    after = best if kept else last
    if after >= before:
        return (
            f"the warm-up did not lower the held-out general loss ({before:.4f} before, "
            f"{after:.4f} after): lower the learning rate, or look at the data (d2lora select)"
        )
    if last > best * (1 + RISE):
        return (
            f"the warm-up overfits its data: the held-out general loss was least at step "
            f"{best_step} of {n_steps} ({best:.4f}) and rose to {last:.4f}"
            + (", so the weights of that step are kept" if kept else "")
            + ". Take more rows, fewer epochs or a lower learning rate"
            + ("" if kept else ", or leave out --no-keep-best")
        )
    return None
