"""Log-probabilities of chosen tokens, at the price of those tokens only.

A language model's head is its largest matrix product, and fine-tuning needs it at supervised
positions alone. `TokenScorer` runs the decoder, picks those hidden states and applies the head
to them. Shapes: B rows, T tokens, P chosen positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from d2lora.batches import Batch, Branches, Encoded, collate, micro_batches
from d2lora.models import causal_model


class TokenScorer(nn.Module):
    """Scores the supervised tokens of a batch; the one forward pass of training and scoring.

    It is what gets wrapped for several devices, so gradients are synchronised by its `forward`.
    Models that change logits after the head (soft caps, scaling) or that see padding on the right
    are found out by a comparison on the first batch and take their own forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap a causal language model, with or without adapters."""
        super().__init__()
        self.model = model
        self._plain_head: bool | None = None

    def forward(self, batch: Batch | Branches) -> Tensor:
        """Return the log-probabilities of `batch.targets_P`, float32, shape (P,)."""
        branched = isinstance(batch, Branches)
        logits_PV = (self._branched(batch) if branched else self._logits(batch)).float()
        return -functional.cross_entropy(logits_PV, batch.targets_P, reduction="none")

    def _logits(self, batch: Batch) -> Tensor:
        batch = within_positions(batch, causal_model(self.model))
        if self._plain_head is None:
            self._plain_head = self._compare(batch)
        if self._plain_head:
            return self._head_at_positions(batch)
        return self._whole_forward(batch)

    def _head_at_positions(self, batch: Batch) -> Tensor:
        """Run the decoder without a mask: with padding on the right, causality hides it."""
        causal = causal_model(self.model)
        decoder = getattr(causal, causal.base_model_prefix)
        hidden_BTD = decoder(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
        head = causal.get_output_embeddings()
        assert head is not None
        return head(hidden_BTD[batch.rows_P, batch.columns_P])

    def _branched(self, batch: Branches) -> Tensor:
        """Run the decoder on prompts with several endings, each at its own positions."""
        causal = causal_model(self.model)
        decoder = getattr(causal, causal.base_model_prefix)
        hidden_BTD = decoder(
            input_ids=batch.ids_BT,
            position_ids=batch.positions_BT,
            attention_mask=batch.mask_B1TT,
            use_cache=False,
        ).last_hidden_state
        head = causal.get_output_embeddings()
        assert head is not None
        return head(hidden_BTD[batch.rows_P, batch.columns_P])

    def _whole_forward(self, batch: Batch) -> Tensor:
        output = causal_model(self.model)(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False
        )
        return output.logits[batch.rows_P, batch.columns_P]

    @torch.no_grad()
    def _compare(self, batch: Batch) -> bool:
        """Say whether the short way gives the model's own logits on the shortest row, padded."""
        if causal_model(self.model).get_output_embeddings() is None:
            return False
        training = self.model.training
        self.model.eval()
        row = int(batch.mask_BT.sum(1).argmin())
        one = batch.row(row)
        same = torch.allclose(
            self._head_at_positions(one).float(), self._whole_forward(one).float(), atol=1e-2
        )
        self.model.train(training)
        return same


def within_positions(batch: Batch, model: nn.Module) -> Batch:
    """Return the batch without padding that lies beyond a model's last position."""
    n_positions = getattr(model.config, "max_position_embeddings", None)
    beyond = n_positions is not None and batch.ids_BT.shape[1] > n_positions
    return batch.trimmed() if beyond else batch


def pass_tokens(device: torch.device, wanted: int = 0) -> int:
    """Return how many padded tokens one pass takes: as wanted, else what suits the device.

    On a CPU small passes stay in the cache and waste less on padding.
    """
    return wanted or (1024 if device.type == "cpu" else 8192)


def device_of_scorer(scorer: nn.Module) -> torch.device:
    """Return the device that a scorer, wrapped or not, computes on."""
    return next(scorer.parameters()).device


def sum_by_row(values_P: Tensor, batch: Batch) -> Tensor:
    """Return the sum of values over each row's positions, shape (B,)."""
    total_B = torch.zeros(len(batch.ids_BT), dtype=values_P.dtype, device=values_P.device)
    return total_B.index_add(0, batch.rows_P, values_P)


@torch.no_grad()
def log_probabilities(
    scorer: nn.Module, items: Sequence[Encoded], pad_id: int, max_tokens: int = 0
) -> list[float]:
    """Return the summed log-probability of each item's supervised tokens, in the given order."""
    device = device_of_scorer(scorer)
    order = sorted(range(len(items)), key=lambda index: -len(items[index].ids))
    scores: dict[int, float] = {}
    done = 0
    limit = pass_tokens(device, max_tokens)
    for group in micro_batches([items[index] for index in order], limit):
        batch = collate(group, pad_id).to(device)
        sums = sum_by_row(scorer(batch), batch).tolist()
        scores |= dict(zip(order[done : done + len(group)], sums, strict=True))
        done += len(group)
    return [scores[index] for index in range(len(items))]


def mean_loss(
    scorer: nn.Module, items: Sequence[Encoded], pad_id: int, max_tokens: int = 0
) -> float:
    """Return the mean negative log-probability, in nats, over all supervised tokens."""
    total = -sum(log_probabilities(scorer, items, pad_id, max_tokens))
    return total / sum(item.n_supervised for item in items)
