"""Whether a model computes several endings of one prompt in a row as it computes each by itself.

Numbers alone do not tell it in 16 bits: what a window of attention, a recurrent state or positions
of the model's own change may be no more than rounding in the sum over an ending's tokens. So it is
asked first what the longest ending depends on, placed behind the others. Shapes: B rows, T tokens,
P scored positions.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2lora.adapters.base import causal_model, n_embedded, short_factor_limit
from d2lora.data.batches import Question, branch
from d2lora.runtime.attempts import succeeds
from d2lora.runtime.modes import in_evaluation
from d2lora.scoring.scorer import TokenScorer

_WINDOWS = (
    "sliding_window sliding_window_size attention_window attention_window_size window_size "
    "local_attention_window_len attention_chunk_size index_topk indexer_budget"
).split()
"""What configurations call the number of tokens that a token sees at most."""


def shared_reach(model: nn.Module) -> int:
    """Return up to how many tokens, prompt and ending together, a prompt may be shared at all.

    As many as a token sees in every layer, and as are turned by LongRoPE's short factors.
    """
    config: Any = causal_model(model).config.get_text_config(decoder=True)
    sizes = (getattr(config, name, None) for name in _WINDOWS)
    windows = (size for size in sizes if isinstance(size, int) and size > 0)
    return min(*windows, short_factor_limit(model), sys.maxsize)


@torch.no_grad()
def can_share(
    scorer: TokenScorer, question: Question, pad_id: int, is_equal: Callable[[], bool]
) -> bool:
    """Say whether one row with all endings, within `shared_reach`, gives what a row for each gives.

    Args:
        scorer: Of the model.
        question: The prompt and its endings.
        pad_id: Token id for padding.
        is_equal: Compares the scores of both ways.
    """

    def check() -> bool:
        with in_evaluation(scorer.model):
            return _is_apart(scorer, question, pad_id) and is_equal()

    return succeeds(check)


def _is_apart(scorer: TokenScorer, question: Question, pad_id: int) -> bool:
    """Say whether the longest ending depends on its own positions and on no other ending."""
    *others, last = sorted(question.endings, key=len)
    if not others or len(last) < 2:  # the first token hangs on the prompt alone
        return True
    n_tokens = n_embedded(scorer.model)
    changed = [tuple((token + 1) % n_tokens for token in ending) for ending in others]
    known, beside = (Question(question.prompt, (*endings, last)) for endings in (others, changed))
    known_P, beside_P = (_of_last(scorer, each, pad_id) for each in (known, beside))
    moved_P = _of_last(scorer, known, pad_id, shift=-1)
    # Which experts other tokens go to changes how a product is cut up, so the last bits may differ.
    least = max(1e-4, 2 * torch.finfo(causal_model(scorer.model).dtype).eps)
    blind = float((beside_P - known_P).abs().mean()) <= least
    return blind and not torch.equal(moved_P, known_P)


def _of_last(scorer: TokenScorer, question: Question, pad_id: int, shift: int = 0) -> Tensor:
    """Return the log-probabilities of the last ending's tokens, its positions moved, (P,)."""
    causal = causal_model(scorer.model)
    rows = branch([question], pad_id, causal.dtype)
    begin = question.length - len(question.endings[-1])
    rows.positions_BT[0, begin : question.length] += shift
    is_last_P = rows.owners_P == len(question.endings) - 1
    return scorer(rows.to(causal.device))[is_last_P.to(causal.device)]
