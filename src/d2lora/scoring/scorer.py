"""Log-probabilities of chosen tokens, at the cost of those tokens only.

A language model's head is its largest matrix product, and fine-tuning needs it at supervised
positions alone. `TokenScorer` runs the decoder, picks those hidden states and applies the head
to them. Shapes: B rows, T tokens, P chosen positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional

from d2lora import fast
from d2lora.adapters.base import causal_model, n_positions, short_factor_limit
from d2lora.adapters.sharding import is_sharded
from d2lora.data.batches import Batch, Branches, Encoded, collate, micro_batches
from d2lora.errors import ModelError
from d2lora.fast import cuda_graphs, head
from d2lora.fast.packing import pack, row_by_row, takes_packed_rows
from d2lora.fast.probing import Probed
from d2lora.runtime.attempts import succeeds
from d2lora.runtime.modes import in_evaluation
from d2lora.runtime.rounding import agree_closely, tolerance

_HEAD_TOKENS = 8
_NATS = 2.5
"""Nats that a token of text costs, about; rounding is relative to them."""


class TokenScorer(nn.Module):
    """Scores the supervised tokens of a batch; the one forward pass of training and scoring.

    The fastest way that gives the model's own log-probabilities is found on the first batch, and
    again on longer rows: rows end to end without padding, on the fast path; rows padded on the
    right; the model's whole forward pass, for models that change logits after the head (soft caps,
    scaling) or see padding; or that of each row alone, for models that see it in spite of a mask.
    A sharded base computes a batch in one whole pass, as all processes take part in each.
    """

    def __init__(self, model: nn.Module, *, replays: bool = False) -> None:
        """Wrap a causal language model, with or without adapters.

        Args:
            model: The model.
            replays: On the fast path, record passes with a gradient on a GPU: nothing
                hooks into the model, its weights are changed in place only, and every pass is
                followed by its backward pass.
        """
        super().__init__()
        self.model = model
        self._replays = replays
        self._replayed: cuda_graphs.Replayed | None = None
        self._used = fast.used_in(model)
        self._probed = Probed()
        self._ways: list[Callable[[Batch], Tensor]] = []
        self._is_head_last: bool | None = None
        self._limit = short_factor_limit(model)
        self._sharded = is_sharded(model)

    @property
    def way(self) -> str:
        """How the last batch was computed, in words; nothing before the first."""
        names = {
            "_packed": "rows end to end", "_padded": "rows padded",
            "_whole": "rows padded, whole model", "_alone": "each row alone",
        }  # fmt: skip
        return names[self._ways[0].__name__] if self._ways else ""

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return next(self.parameters()).device

    @property
    def used(self) -> fast.Used:
        """The record of the fast paths that the model may use now."""
        return fast.used_in(self.model)

    def forward(self, batch: Batch | Branches) -> Tensor:
        """Return the log-probabilities of `batch.targets_P`, float32, shape (P,).

        Of a batch with `every_token` those of the whole vocabulary, shape (P, V).
        """
        if isinstance(batch, Branches):
            return self._branched(batch)
        batch = within_positions(batch, causal_model(self.model))
        if batch.ids_BT.shape[1] > self._limit:
            return self._by_length(batch)
        return self._fastest(batch)(batch)

    def _by_length(self, batch: Batch) -> Tensor:
        """Score rows together that are all within the limit, or all beyond; others one by one."""
        beyond_B = batch.mask_BT.sum(1) > self._limit
        rows = [batch]
        if beyond_B.any() and not beyond_B.all():
            rows = [batch.row(index) for index in range(len(beyond_B))]
        trimmed = [row.trimmed()._replace(every_token=batch.every_token) for row in rows]
        return torch.cat([self._fastest(row)(row) for row in trimmed])

    def _packed(self, batch: Batch) -> Tensor:
        """Run the decoder on rows end to end."""
        rows = pack(batch)
        with row_by_row(causal_model(self.model)):
            hidden_1ND = self._hidden(
                input_ids=rows.ids_1N, position_ids=rows.positions_1N, cu_seq_lens_q=rows.bounds
            )
        return self._of_hidden(hidden_1ND[0, rows.bounds[batch.rows_P] + batch.columns_P], batch)

    def _padded(self, batch: Batch) -> Tensor:
        """Run the decoder without a mask: with padding on the right, causality hides it."""
        hidden_BTD = self._decoder(batch.ids_BT)(batch.ids_BT)
        return self._of_hidden(hidden_BTD[batch.rows_P, batch.columns_P], batch)

    def _decoder(self, ids_BT: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what computes hidden states from ids: the decoder, or its recordings."""
        wanted = self._replays and self.used.allowed and torch.is_grad_enabled()
        width = cuda_graphs.recorded_width(ids_BT.shape[1])
        most = min(n_positions(self.model), self._limit)
        if not wanted or ids_BT.device.type != "cuda" or width > most:
            return self._plain
        if self._replayed is None:
            self._replays = cuda_graphs.fits(self.model)
            if not self._replays:
                return self._plain
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self._replayed = cuda_graphs.Replayed(self._plain, parameters)
        if self._replayed.has_recordings:
            self.used.take("recorded passes")
        return self._replayed

    def stop_recording(self) -> None:
        """Record no more passes, and give back the memory of those recorded."""
        self._replays, self._replayed = False, None

    def _plain(self, ids_BT: Tensor) -> Tensor:
        return self._hidden(input_ids=ids_BT)

    def _branched(self, batch: Branches) -> Tensor:
        """Run the model on prompts with several endings, each at its own positions."""
        inputs = {
            "input_ids": batch.ids_BT,
            "position_ids": batch.positions_BT,
            "attention_mask": batch.mask_B1TT,
        }
        if self._ends_in_head(batch.ids_BT):
            hidden_BTD = self._hidden(**inputs)
            return self._of_hidden(hidden_BTD[batch.rows_P, batch.columns_P], batch)
        logits_BTV = causal_model(self.model)(**inputs, use_cache=False).logits
        return _of_logits(logits_BTV[batch.rows_P, batch.columns_P], batch)

    def _whole(self, batch: Batch) -> Tensor:
        output = causal_model(self.model)(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False
        )
        return _of_logits(output.logits[batch.rows_P, batch.columns_P], batch)

    def _alone(self, batch: Batch) -> Tensor:
        """Run the whole model on each row by itself, without padding or mask."""
        causal, scores = causal_model(self.model), list[Tensor]()
        for index in range(len(batch.ids_BT)):
            row = batch.row(index).trimmed()._replace(every_token=batch.every_token)
            logits_TV = causal(input_ids=row.ids_BT, use_cache=False).logits[0]
            scores.append(_of_logits(logits_TV[row.columns_P], row))
        return torch.cat(scores)

    def _hidden(self, **inputs: Tensor) -> Tensor:
        causal = causal_model(self.model)
        decoder = getattr(causal, causal.base_model_prefix)
        return decoder(**inputs, use_cache=False).last_hidden_state

    def _of_hidden(self, hidden_PD: Tensor, batch: Batch | Branches) -> Tensor:
        layer = causal_model(self.model).get_output_embeddings()
        assert layer is not None
        if self.used.allowed and head.fits(layer) and not _wants_every_token(batch):
            self.used.take("head without logits")
            return head.log_probabilities(hidden_PD, layer, batch.targets_P)
        return _of_logits(layer(hidden_PD), batch)

    @torch.no_grad()
    def _ends_in_head(self, ids_BT: Tensor) -> bool:
        """Say whether logits are the head's product with the decoder's hidden states alone.

        The same operations are compared, so that little is allowed: a soft cap of logits changes
        small ones by less than what other ways of computing them do.
        """
        if self._is_head_last is None:
            causal, ids_1T = causal_model(self.model), ids_BT[:1, :_HEAD_TOKENS]

            def same() -> bool:
                head_layer = causal.get_output_embeddings()
                if head_layer is None:
                    return False
                own = causal(input_ids=ids_1T, use_cache=False).logits.float()
                product = head_layer(self._hidden(input_ids=ids_1T)).float()
                return agree_closely(product, own)

            with in_evaluation(self.model):
                self._is_head_last = succeeds(same)
        return self._is_head_last

    def _fastest(self, batch: Batch) -> Callable[[Batch], Tensor]:
        """Return the first way that scores rows behind others as the model does alone."""
        if self._sharded:
            return self._in_step(batch)
        used = self.used
        if not self._ways or used is not self._used:
            causal = causal_model(self.model)
            packed = [self._packed] if used.allowed and takes_packed_rows(causal) else []
            hidden = [*packed, self._padded] if self._ends_in_head(batch.ids_BT) else []
            self._used, self._probed = used, Probed()
            self._ways = [*hidden, self._whole, self._alone]
        # By the width: to look at the rows themselves would make a GPU wait in every pass.
        width = batch.ids_BT.shape[1]
        for is_due, row in zip(
            self._probed.lacks(width, width), (_shortest, _longest), strict=True
        ):
            probe = batch.row(row(batch))
            while is_due and len(self._ways) > 1 and not succeeds(partial(self._is_equal, probe)):
                del self._ways[0]
        if self._ways[0] == self._packed:
            used.take("rows end to end")
        return self._ways[0]

    def _in_step(self, batch: Batch) -> Callable[[Batch], Tensor]:
        """Return the way of a sharded base: tried once, on the first batch of every process.

        Raises:
            ModelError: If it scores rows otherwise than alone.
        """
        if not self._ways:
            self._ways = [self._whole]
            rows = [batch.row(row(batch)) for row in (_shortest, _longest)]
            equal = [succeeds(partial(self._is_equal, row)) for row in rows]
            if not all(gather_object(equal)):
                kind = type(causal_model(self.model)).__name__.removeprefix("FSDP")
                raise ModelError(
                    f"--shard-base: {kind} sees padding in spite of a mask, so that its rows would "
                    "have to be computed one by one; leave it out"
                )
        return self._whole

    @torch.no_grad()
    def _is_equal(self, row: Batch) -> bool:
        """Say whether the first way scores a row behind another as the model does alone."""
        with in_evaluation(self.model):
            own_P = self._alone(row)
            off_P = (self._ways[0](row.behind_another())[-len(own_P) :] - own_P).abs()
        # Their mean, as one token alone may be rounded far more.
        allowed = tolerance(causal_model(self.model).dtype) * _NATS
        return float(off_P.sum()) <= allowed * len(own_P)


def _shortest(batch: Batch) -> int:
    """Return the shortest of the rows that predict something, or the first row."""
    rows = _predicting(batch)
    return int(rows[batch.mask_BT[rows].sum(1).argmin()])


def _longest(batch: Batch) -> int:
    """Return the longest of the rows that predict something, or the first row."""
    rows = _predicting(batch)
    return int(rows[batch.mask_BT[rows].sum(1).argmax()])


def _predicting(batch: Batch) -> Tensor:
    return batch.rows_P.unique() if len(batch.rows_P) else batch.rows_P.new_zeros(1)


def _of_logits(logits_PV: Tensor, batch: Batch | Branches) -> Tensor:
    if _wants_every_token(batch):
        return logits_PV.float().log_softmax(-1)
    return -functional.cross_entropy(logits_PV.float(), batch.targets_P, reduction="none")


def _wants_every_token(batch: Batch | Branches) -> bool:
    return isinstance(batch, Batch) and batch.every_token


def within_positions(batch: Batch, model: nn.Module) -> Batch:
    """Return the batch without padding that lies beyond a model's last position."""
    return batch.trimmed() if batch.ids_BT.shape[1] > n_positions(model) else batch


def pass_tokens(device: torch.device, wanted: int = 0) -> int:
    """Return how many padded tokens one pass takes: as wanted, else what suits the device.

    On a CPU small passes stay in the cache and waste less on padding.
    """
    return wanted or (1024 if device.type == "cpu" else 8192)


def sum_by_row(values_P: Tensor, batch: Batch) -> Tensor:
    """Return the sum of values over each row's positions, shape (B,)."""
    total_B = torch.zeros(len(batch.ids_BT), dtype=values_P.dtype, device=values_P.device)
    return total_B.index_add(0, batch.rows_P, values_P)


@torch.no_grad()
def log_probabilities(
    scorer: TokenScorer, items: Sequence[Encoded], pad_id: int, max_tokens: int = 0
) -> list[float]:
    """Return the summed log-probability of each item's supervised tokens, in the given order."""
    device = scorer.device
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
    scorer: TokenScorer, items: Sequence[Encoded], pad_id: int, max_tokens: int = 0
) -> float:
    """Return the mean negative log-probability, in nats, over all supervised tokens."""
    total = -sum(log_probabilities(scorer, items, pad_id, max_tokens))
    return total / sum(item.n_supervised for item in items)
