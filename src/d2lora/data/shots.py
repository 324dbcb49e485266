"""Few-shot prompts: worked examples before a row's prompt, as many as there is room for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from d2lora.data.encode import Encoder
from d2lora.data.rows import Example, Message
from d2lora.data.sources import nested_order
from d2lora.errors import DataError, counted


class Prompted(NamedTuple):
    """Test rows with worked examples before their prompts."""

    examples: list[Example]
    n_fewer: int
    """How many of them show fewer than were asked for."""


def unasked(shots: Sequence[Example], tests: Sequence[Example]) -> list[Example]:
    """Return the rows whose prompt is none of the test rows', so that no answer is shown."""
    asked = {example.prompt for example in tests}
    return [shot for shot in shots if shot.prompt not in asked]


def chosen_shots(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """Return n seeded examples to show; of one seed the fewer are among the more.

    Raises:
        DataError: If there are fewer.
    """
    if n > len(examples):
        raise DataError(
            f"{counted(n, 'shot')} requested, but the training data has "
            f"{counted(len(examples), 'row')} that can be shown"
        )
    return [examples[index] for index in nested_order(len(examples), seed)[:n]]


def with_shots(
    encoder: Encoder, examples: Sequence[Example], shots: Sequence[Example], room: int
) -> Prompted:
    """Return examples with worked ones before their prompts.

    Args:
        encoder: Of the base and the chat format.
        examples: The test rows.
        shots: What to show; the last are left out where a prompt would not fit.
        room: Tokens that an answer needs.
    """
    limit = encoder.n_positions - room
    prompted = [showing(encoder, example, shots, limit) for example in examples]
    n_fewer = sum(n_shown < len(shots) for _, n_shown in prompted)
    return Prompted([example for example, _ in prompted], n_fewer)


def showing(
    encoder: Encoder, example: Example, shots: Sequence[Example], limit: int
) -> tuple[Example, int]:
    """Return an example with as many shots as fit into `limit` tokens, and how many these are."""
    for n in range(len(shots), 0, -1):
        system = [turn for turn in example.prompt if turn.role == "system"]
        asked = [turn for turn in example.prompt if turn.role != "system"]
        shown = [turn for shot in shots[:n] for turn in _turns(shot)]
        prompted = replace(example, prompt=(*system, *shown, *asked))
        if len(encoder.prompt_of(prompted)) <= limit:
            return prompted, n
    return example, 0


def _turns(shot: Example) -> list[Message]:
    asked = [turn for turn in shot.prompt if turn.role != "system"]
    return [*asked, shot.answer]
