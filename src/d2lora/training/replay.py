"""General rows beside the training rows, so that an adapter forgets less.

Every optimizer step adds to the loss over its own rows that over a few general rows, times a
weight: either their cross-entropy, so that they are rehearsed (Robins 1995, "Catastrophic
forgetting, rehearsal and pseudorehearsal"), or the divergence from the base's predictions on them,
so that these stay (Li and Hoiem 2016, "Learning without forgetting", arXiv 1606.09282).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn import functional

from d2lora.data.batches import Encoded, collate
from d2lora.runtime.modes import in_evaluation
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import PhaseSettings
from d2lora.settings.seeds import seed_of
from d2lora.training.objectives import SFT, Objective, Share
from d2lora.training.schedule import StepSchedule, batch_size_of

_KL_LOGITS = 2**26
"""Logits that a pass may hold where the whole vocabulary is compared."""


@dataclass(frozen=True)
class BaseDivergence:
    """Mean Kullback-Leibler divergence, in nats, of the next token from the base's.

    At each supervised position it is sum_v q_v (log q_v - log p_v), with q the base's
    distribution, that is the model's with its adapter switched off, and p the model's.
    """

    model: PeftModel

    def share(
        self, scorer: TokenScorer, items: Sequence[Encoded], batch: Sequence[Encoded], pad_id: int
    ) -> Share:
        """Return the divergence at the items' positions over the batch's number of them."""
        rows = collate(items, pad_id).to(scorer.device)._replace(every_token=True)
        with torch.no_grad(), in_evaluation(self.model), self.model.disable_adapter():
            base_PV = scorer(rows)
        divergence = functional.kl_div(scorer(rows), base_PV, reduction="sum", log_target=True)
        return Share(divergence / sum(item.n_supervised for item in batch), {})


@dataclass(frozen=True)
class Replay:
    """The general rows of a run: which of them each step sees, their loss and its weight."""

    rows: Sequence[Encoded]
    objective: Objective[Encoded]
    weight: float
    schedule: StepSchedule
    pass_tokens: int | None = None
    """Padded tokens of one pass, at most; None: as for the training rows."""

    @classmethod
    def of(
        cls,
        rows: Sequence[Encoded],
        n_training_rows: int,
        model: PeftModel,
        settings: PhaseSettings,
    ) -> "Replay | None":
        """Lay out the replay of a run; None where it has no general rows."""
        if not rows:
            return None
        size = settings.replay_batch_size or -(-batch_size_of(n_training_rows, settings) // 4)
        seed = seed_of(settings, "order")
        schedule = StepSchedule(len(rows), min(size, len(rows)), 0, seed)
        if settings.replay_loss == "sft":
            return cls(rows, SFT(), settings.replay_weight, schedule)
        limit = max(1, _KL_LOGITS // model.get_output_embeddings().weight.shape[0])
        return cls(rows, BaseDivergence(model), settings.replay_weight, schedule, limit)

    @property
    def passes_per_row(self) -> float:
        """Passes, forward and backward, that a row costs; the base's, forward alone, is half."""
        return 1.5 if isinstance(self.objective, BaseDivergence) else 1.0

    def batch(self, step: int) -> list[Encoded]:
        """Return the general rows of optimizer step `step` (from 0)."""
        return [self.rows[index] for index in self.schedule.batch(step)]
