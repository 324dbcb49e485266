"""Multiple choice by log-probability against lm-evaluation-harness, item by item the same.

    python benchmarks/choices.py --questions 100

Both score the same token ids (sciq and others of the shared forgetting set) with the same model:
d2lora as `evaluate --choices` does, the harness's `HFLM` on (context, continuation) pairs at each
of several batch sizes, of which the best counts. Reading and tokenizing are not timed. The largest
difference of two log-probabilities is printed; above 0.01 nats the program fails. Sides take turns;
medians.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import base_of, head, medians, parser_of, row, taking_turns
from d2lora import fast
from d2lora.adapters.base import Base, load_base
from d2lora.data.batches import Question
from d2lora.data.choices import read_choice_questions
from d2lora.data.encode import Encoder
from d2lora.evaluation.measure import questions_of
from d2lora.scoring.multiple_choice import continuation_scores
from d2lora.scoring.scorer import TokenScorer
from d2lora.settings import BaseSettings

BATCH_SIZES = (8, 32, 128)
LARGEST_DIFFERENCE = 0.01


def main() -> None:
    """Measure every size and print a Markdown table."""
    parser = parser_of(__doc__, data="forgetting/test.jsonl")
    parser.add_argument("--sizes", nargs="+", default=["embedded", "40M"])
    parser.add_argument("--questions", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    head(
        "base", "questions", "choices", "lm-eval, s (batch size)", "d2lora, s", "ratio",
        "largest difference, nats",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            name = base_of(size, Path(folder), args.data)
            base = load_base(BaseSettings(base=name, device="cpu", threads=args.threads))
            asked = read_choice_questions([str(args.data)]).questions[: args.questions]
            questions = questions_of(Encoder.of(base, None), asked)
            compare(size, base, questions, args.rounds)


def compare(size: str, base: Base, questions: Sequence[Question], rounds: int) -> None:
    """Print the row of one base."""
    results: dict[str, list[float]] = {}

    def timed(name: str, score: Callable[[], list[float]]) -> float:
        started = time.perf_counter()
        results[name] = score()
        return time.perf_counter() - started

    calls: dict[str, Callable[[], list[float]]] = {
        str(batch): partial(harness, base, questions, batch) for batch in BATCH_SIZES
    }
    calls["d2lora"] = partial(own, base, questions)
    sides = {name: partial(timed, name, call) for name, call in calls.items()}
    elapsed_s = medians(taking_turns(sides, rounds))
    ours = elapsed_s.pop("d2lora")
    best = min(elapsed_s, key=lambda name: elapsed_s[name])
    pairs = zip(results[best], results["d2lora"], strict=True)
    difference = max(abs(first - second) for first, second in pairs)
    row(
        size, len(questions), len(results[best]), f"{elapsed_s[best]:.1f} ({best})", f"{ours:.1f}",
        f"{elapsed_s[best] / ours:.2f}", f"{difference:.1e}",
    )  # fmt: skip
    if difference > LARGEST_DIFFERENCE:
        sys.exit("the sides disagree")


def own(base: Base, questions: Sequence[Question]) -> list[float]:
    """Score with d2lora."""
    with fast.enabled(base.model, when=True):
        scores = continuation_scores(TokenScorer(base.model), questions, base.pad_id)
    return [score for of_question in scores for score in of_question]


def harness(base: Base, questions: Sequence[Question], batch_size: int) -> list[float]:
    """Score with lm-evaluation-harness."""
    from lm_eval.models.huggingface import HFLM

    model: Any = HFLM(base.model, tokenizer=base.tokenizer, batch_size=batch_size, device="cpu")
    requests = [(("", ""), list(q.prompt), list(c)) for q in questions for c in q.endings]
    scored = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return [log_probability for log_probability, _ in scored]


if __name__ == "__main__":
    main()
