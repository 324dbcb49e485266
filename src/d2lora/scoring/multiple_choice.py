"""Log-probabilities of several continuations of one prompt, the prompt computed once.

A multiple-choice question is one row: the prompt, then every choice, each at the positions right
behind the prompt and blind to the other choices. That is what the choices score one by one, at a
fraction of the cost where the prompt is long. Shapes: B questions, T tokens, P scored positions.
"""

from collections.abc import Sequence
from functools import partial

import torch

from d2lora.adapters.base import causal_model
from d2lora.data.batches import Encoded, Question, branch
from d2lora.runtime.rounding import agree
from d2lora.scoring.scorer import TokenScorer, log_probabilities, pass_tokens
from d2lora.scoring.sharing import can_share, shared_reach


@torch.no_grad()
def continuation_scores(
    scorer: TokenScorer, questions: Sequence[Question], pad_id: int
) -> list[list[float]]:
    """Return the summed log-probability of every continuation, question by question.

    On the fast path the prompt is computed once. Models that do not support such a mask are
    detected on the shortest and the longest question, and on that with the longest ending.
    """
    scorer.eval()
    order = sorted(range(len(questions)), key=lambda index: -questions[index].length)
    probes = [questions[order[place]] for place in (0, -1)] if order else []
    probes += sorted(questions, key=lambda question: max(map(len, question.endings)))[-1:]
    farthest = max((question.reach for question in questions), default=0)
    if (
        not scorer.used.allowed
        or farthest > shared_reach(scorer.model)
        or not all(
            can_share(scorer, question, pad_id, partial(_equal, scorer, question, pad_id))
            for question in probes
        )
    ):
        return _apart(scorer, questions, pad_id)
    scorer.used.take("shared prompts")
    limit = pass_tokens(next(scorer.parameters()).device)
    scores: dict[int, list[float]] = {}
    while order:
        fitting = max(1, limit // questions[order[0]].length)
        chunk, order = order[:fitting], order[fitting:]
        results = _together(scorer, [questions[index] for index in chunk], pad_id)
        scores.update(zip(chunk, results, strict=True))
    return [scores[index] for index in range(len(questions))]


def _equal(scorer: TokenScorer, question: Question, pad_id: int) -> bool:
    """Say whether one row with all continuations gives what a row for each gives."""
    together, apart = (
        torch.tensor(score(scorer, [question], pad_id)[0]) for score in (_together, _apart)
    )
    return agree(together, apart, causal_model(scorer.model).dtype)


def _apart(scorer: TokenScorer, questions: Sequence[Question], pad_id: int) -> list[list[float]]:
    items = [Encoded((*q.prompt, *c), len(q.prompt)) for q in questions for c in q.endings]
    scores = iter(log_probabilities(scorer, items, pad_id))
    return [[next(scores) for _ in q.endings] for q in questions]


def _together(scorer: TokenScorer, questions: Sequence[Question], pad_id: int) -> list[list[float]]:
    causal = causal_model(scorer.model)
    rows = branch(questions, pad_id, causal.dtype).to(causal.device)
    total = torch.zeros(sum(len(q.endings) for q in questions), device=causal.device)
    sums = iter(total.index_add(0, rows.owners_P, scorer(rows)).tolist())
    return [[next(sums) for _ in q.endings] for q in questions]
