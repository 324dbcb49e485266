"""What is minimised. Both phases name an objective; the loop knows nothing else about it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from d2lora.encode import Encoded, collate


class Objective(Protocol):
    """A loss that is a sum over a batch's parts, so that micro-batches change nothing."""

    def weight(self, batch: Sequence[Encoded]) -> float:
        """Return what the summed loss of an optimizer batch is divided by."""
        ...

    def loss_sum(self, scorer: nn.Module, items: Sequence[Encoded], pad_id: int) -> Tensor:
        """Return the summed loss of one micro-batch, a scalar with gradient."""
        ...


class SFT:
    """Supervised fine-tuning: mean cross-entropy, in nats, over the supervised tokens.

    Every supervised token of the optimizer batch weighs the same, as in TRL's SFTTrainer
    (`num_items_in_batch`), whatever the micro-batches.
    """

    def weight(self, batch: Sequence[Encoded]) -> float:
        """Return the number of supervised tokens."""
        return float(sum(item.n_supervised for item in batch))

    def loss_sum(self, scorer: nn.Module, items: Sequence[Encoded], pad_id: int) -> Tensor:
        """Return the summed negative log-probability of the supervised tokens."""
        device = next(scorer.parameters()).device
        log_probability_P: Tensor = scorer(collate(items, pad_id).to(device))
        return -log_probability_P.sum()
