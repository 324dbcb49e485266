"""What a model answers to rows that were held out, and how likely it takes the right answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2lora.adapters.base import Base
from d2lora.adapters.manifest import base_for
from d2lora.data.encoded_sets import encode_all
from d2lora.data.reading import TaskData
from d2lora.data.rows import Example
from d2lora.data.shots import with_shots
from d2lora.evaluation.generate import adapted, encoder_of
from d2lora.evaluation.measure import BASE, measure
from d2lora.evaluation.test_sets import TestSets
from d2lora.runtime.console import Reporter
from d2lora.scoring.scorer import TokenScorer, log_probabilities
from d2lora.settings import EvaluateSettings


def answers_of(
    base: Base,
    adapter: Path | None,
    data: TaskData,
    shots: Sequence[Example],
    labels: tuple[str, ...],
    tests: EvaluateSettings,
) -> dict[str, Any]:
    """Answer rows and score their gold completions.

    Args:
        base: The base.
        adapter: The adapter on it. None: the base alone.
        data: The rows.
        shots: Worked examples to show before each prompt.
        labels: What closed answers are chosen from.
        tests: How answers are made.

    Returns:
        `outputs`, none where a task has no answers to score, and `losses`, nats per token of each
        gold completion.
    """
    outputs: list[str] = []
    if data.task.metrics:
        sets = TestSets(data, [], [], labels, shots)
        name = BASE if adapter is None else str(adapter)
        records = measure(name, base, sets, tests, Reporter(quiet=True)).task.records
        outputs = [record["output"] for record in records]
    base = base_for(base, adapter)
    with adapted(base, adapter, fast_when=tests.fast) as (model, _):
        encoder = encoder_of(adapter, base, tests.chat_format)
        examples = data.examples
        if shots:
            examples = with_shots(encoder, examples, shots, tests.max_new_tokens).examples
        longest = encoder.n_positions if shots else tests.max_length
        items = encode_all(encoder, examples, longest, "truncate").items
        sums = log_probabilities(TokenScorer(model).eval(), items, base.pad_id)
    losses = [-own / item.n_supervised for own, item in zip(sums, items, strict=True)]
    return {"outputs": outputs, "losses": losses}
