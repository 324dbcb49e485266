"""Log-probabilities of both completions of pairs, the prompt computed once where that is equal.

A pair is one row: the prompt, then both completions right behind it and blind to each other
(see `batches.branch`). Models for which that differs from two rows are detected by a comparison on
the first pairs, and on longer ones, and score the completions as separate rows. Shapes: B pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2lora import fast
from d2lora.adapters.base import causal_model
from d2lora.data.batches import PreferencePair, Question, branch, collate, micro_batches
from d2lora.fast.probing import Probed
from d2lora.runtime.rounding import agree
from d2lora.scoring.scorer import TokenScorer, pass_tokens, sum_by_row
from d2lora.scoring.sharing import can_share, shared_reach


class PairScorer:
    """Scores pairs; what it found about the model is kept for the next batch."""

    def __init__(self) -> None:
        """Start without knowing any model."""
        self._used: fast.Used | None = None

    def __call__(
        self, scorer: TokenScorer, pairs: Sequence[PreferencePair], pad_id: int
    ) -> tuple[Tensor, Tensor]:
        """Return the summed log-probabilities of chosen and rejected completions, (B,) each."""
        used = scorer.used
        if used is not self._used:
            self._used, self._probed = used, Probed()
            self._shares = used.allowed
        ordered = sorted(pairs, key=lambda pair: pair.length)
        if ordered[-1].length > shared_reach(scorer.model):
            return _apart(scorer, pairs, pad_id)
        due = self._probed.lacks(ordered[0].length, ordered[-1].length)
        for is_due, pair in zip(due, (ordered[0], ordered[-1]), strict=True):
            if is_due and self._shares:
                self._shares = _can_share(scorer, pair, pad_id)
        if not self._shares:
            return _apart(scorer, pairs, pad_id)
        used.take("shared prompts")
        return _together(scorer, pairs, pad_id)


@torch.no_grad()
def pair_log_probabilities(
    scorer: TokenScorer, pairs: Sequence[PreferencePair], pad_id: int, max_tokens: int = 0
) -> list[tuple[float, float]]:
    """Return the summed log-probabilities of both completions of each pair, in the given order."""
    limit = pass_tokens(scorer.device, max_tokens)
    score, pairs = PairScorer(), list(pairs)  # from disk once, so that each is one object
    numbers = {id(pair): number for number, pair in enumerate(pairs)}
    found: dict[int, tuple[float, float]] = {}
    for group in micro_batches(pairs, limit):
        sums = torch.stack(score(scorer, group, pad_id), dim=1).tolist()
        for pair, (chosen, rejected) in zip(group, sums, strict=True):
            found[numbers[id(pair)]] = (chosen, rejected)
    return [found[number] for number in range(len(pairs))]


def _apart(
    scorer: TokenScorer, pairs: Sequence[PreferencePair], pad_id: int
) -> tuple[Tensor, Tensor]:
    items = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    batch = collate(items, pad_id).to(scorer.device)
    sums_B = sum_by_row(scorer(batch), batch)
    return sums_B[: len(pairs)], sums_B[len(pairs) :]


def _together(
    scorer: TokenScorer, pairs: Sequence[PreferencePair], pad_id: int
) -> tuple[Tensor, Tensor]:
    questions = [_question(pair) for pair in pairs]
    causal = causal_model(scorer.model)
    rows = branch(questions, pad_id, causal.dtype).to(causal.device)
    values_P = scorer(rows)
    sums_B = torch.zeros(2 * len(pairs), dtype=values_P.dtype, device=values_P.device)
    sums_B = sums_B.index_add(0, rows.owners_P, values_P)
    return sums_B[::2], sums_B[1::2]


def _question(pair: PreferencePair) -> Question:
    items = pair.chosen, pair.rejected
    return Question(
        pair.chosen.ids[: pair.chosen.n_prompt], tuple(item.ids[item.n_prompt :] for item in items)
    )


def _can_share(scorer: TokenScorer, pair: PreferencePair, pad_id: int) -> bool:
    """Say whether one row with both completions gives what two rows give."""
    causal = causal_model(scorer.model)
    # Two rows drop out apart.
    random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in scorer.modules())
    if random or getattr(causal.config, "attention_dropout", 0):
        return False
    if pair.chosen.n_prompt == 0 or causal.get_output_embeddings() is None:
        return False

    def is_equal() -> bool:
        together, apart = (torch.stack(f(scorer, [pair], pad_id)) for f in (_together, _apart))
        return agree(together, apart, causal.dtype)

    return can_share(scorer, _question(pair), pad_id, is_equal)
