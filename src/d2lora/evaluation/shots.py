"""Few-shot prompts: worked examples before each test row, as many as the base has room for."""

from collections.abc import Sequence
from dataclasses import replace

from d2lora.data.encode import Encoder
from d2lora.data.rows import Example, Message
from d2lora.data.sources import nested_order
from d2lora.errors import DataError


def chosen_shots(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """Return n seeded examples to show; of one seed the fewer are among the more.

    Raises:
        DataError: If there are fewer.
    """
    if n > len(examples):
        raise DataError(f"{n} shots are requested, but the training rows are {len(examples)}")
    return [examples[index] for index in nested_order(len(examples), seed)[:n]]


def with_shots(
    encoder: Encoder, examples: Sequence[Example], shots: Sequence[Example], room: int
) -> list[Example]:
    """Return examples with worked ones before their prompts.

    Args:
        encoder: Of the base and the chat format.
        examples: The test rows.
        shots: What to show; the last are left out where a prompt would not fit.
        room: Tokens that an answer needs.
    """
    return [_with(encoder, example, shots, encoder.n_positions - room) for example in examples]


def _with(encoder: Encoder, example: Example, shots: Sequence[Example], limit: int) -> Example:
    for n in range(len(shots), 0, -1):
        system = [turn for turn in example.prompt if turn.role == "system"]
        asked = [turn for turn in example.prompt if turn.role != "system"]
        shown = [turn for shot in shots[:n] for turn in _turns(shot)]
        prompted = replace(example, prompt=(*system, *shown, *asked))
        if len(encoder.prompt_of(prompted)) <= limit:
            return prompted
    return example


def _turns(shot: Example) -> list[Message]:
    asked = [turn for turn in shot.prompt if turn.role != "system"]
    return [*asked, shot.answer]
