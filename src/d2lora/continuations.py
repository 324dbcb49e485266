"""Log-probabilities of several continuations of one prompt, the prompt computed once.

A multiple-choice question is one row: the prompt, then every choice, each at the positions right
behind the prompt and blind to the other choices. That is what the choices score one by one, at a
fraction of the price where the prompt is long. Shapes: B questions, T tokens, P scored positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from d2lora.encode import Encoded
from d2lora.models import causal_model
from d2lora.scorer import TokenScorer, log_probabilities, pass_tokens


@dataclass(frozen=True)
class Question:
    """A prompt and its continuations, as token ids; the prompt is not empty."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @cached_property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.prompt) + sum(map(len, self.continuations))


class _Rows(NamedTuple):
    ids_BT: Tensor
    positions_BT: Tensor
    mask_B1TT: Tensor
    """0 where a token sees another, the number format's least value where not."""
    rows_P: Tensor
    columns_P: Tensor
    targets_P: Tensor
    owners_P: Tensor
    """The continuation, counted over the whole batch, that a position belongs to."""


@torch.no_grad()
def continuation_scores(
    scorer: TokenScorer, questions: Sequence[Question], pad_id: int
) -> list[list[float]]:
    """Return the summed log-probability of every continuation, question by question.

    Models that do not take such a mask are found out by a comparison on the first question and
    score each continuation by itself.
    """
    scorer.eval()
    if not questions:
        return []
    first = questions[:1]
    together, apart = _together(scorer, first, pad_id), _apart(scorer, first, pad_id)
    # Sums of rounded numbers: a 16-bit format tells two masks apart less finely.
    tolerance = 1e-4 if causal_model(scorer.model).dtype == torch.float32 else 2e-2
    if not torch.allclose(torch.tensor(together), torch.tensor(apart), rtol=tolerance, atol=1e-3):
        return _apart(scorer, questions, pad_id)
    order = sorted(range(len(questions)), key=lambda index: -questions[index].length)
    limit = pass_tokens(next(scorer.parameters()).device)
    scores: dict[int, list[float]] = {}
    while order:
        fitting = max(1, limit // questions[order[0]].length)
        chunk, order = order[:fitting], order[fitting:]
        results = _together(scorer, [questions[index] for index in chunk], pad_id)
        scores.update(zip(chunk, results, strict=True))
    return [scores[index] for index in range(len(questions))]


def _apart(scorer: nn.Module, questions: Sequence[Question], pad_id: int) -> list[list[float]]:
    items = [Encoded((*q.prompt, *c), len(q.prompt)) for q in questions for c in q.continuations]
    scores = iter(log_probabilities(scorer, items, pad_id))
    return [[next(scores) for _ in q.continuations] for q in questions]


def _together(scorer: TokenScorer, questions: Sequence[Question], pad_id: int) -> list[list[float]]:
    causal = causal_model(scorer.model)
    rows = _rows(questions, pad_id, causal.dtype)
    rows = _Rows(*(tensor.to(causal.device) for tensor in rows))
    decoder = getattr(causal, causal.base_model_prefix)
    hidden_BTD = decoder(
        input_ids=rows.ids_BT,
        position_ids=rows.positions_BT,
        attention_mask=rows.mask_B1TT,
        use_cache=False,
    ).last_hidden_state
    head = causal.get_output_embeddings()
    assert head is not None
    logits_PV = head(hidden_BTD[rows.rows_P, rows.columns_P]).float()
    losses_P = functional.cross_entropy(logits_PV, rows.targets_P, reduction="none")
    total = torch.zeros(sum(len(q.continuations) for q in questions), device=causal.device)
    sums = iter((-total.index_add(0, rows.owners_P, losses_P)).tolist())
    return [[next(sums) for _ in q.continuations] for q in questions]


def _rows(questions: Sequence[Question], pad_id: int, dtype: torch.dtype) -> _Rows:
    longest = max(question.length for question in questions)
    ids_BT = torch.full((len(questions), longest), pad_id)
    positions_BT = torch.zeros_like(ids_BT)
    sees_BTT = torch.eye(longest, dtype=torch.bool).repeat(len(questions), 1, 1)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    owner = 0
    for row, question in enumerate(questions):
        n_prompt = len(question.prompt)
        ids_BT[row, :n_prompt] = torch.tensor(question.prompt)
        positions_BT[row, :n_prompt] = torch.arange(n_prompt)
        sees_BTT[row, :n_prompt, :n_prompt] = torch.ones(n_prompt, n_prompt).tril().bool()
        begin = n_prompt
        for continuation in question.continuations:
            end = begin + len(continuation)
            ids_BT[row, begin:end] = torch.tensor(continuation)
            positions_BT[row, begin:end] = torch.arange(n_prompt, n_prompt + len(continuation))
            sees_BTT[row, begin:end, :n_prompt] = True
            own = torch.ones(len(continuation), len(continuation)).tril().bool()
            sees_BTT[row, begin:end, begin:end] = own
            columns += [n_prompt - 1, *range(begin, end - 1)]
            rows += [row] * len(continuation)
            targets += continuation
            owners += [owner] * len(continuation)
            owner, begin = owner + 1, end
    hidden = torch.zeros(sees_BTT.shape, dtype=dtype)
    hidden.masked_fill_(~sees_BTT, torch.finfo(dtype).min)
    where = (torch.tensor(values) for values in (rows, columns, targets, owners))
    return _Rows(ids_BT, positions_BT, hidden[:, None], *where)
