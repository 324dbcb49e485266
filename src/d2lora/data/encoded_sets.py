"""Many examples as token ids: the length limit, rows that cannot be encoded, what was cut."""

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from d2lora.data.batches import Encoded, PreferencePair, T
from d2lora.data.encode import Encoder
from d2lora.data.processes import mapped
from d2lora.data.rows import Example
from d2lora.data.spool import Lazy, Spool
from d2lora.errors import DataError, listed
from d2lora.settings import Overlong

U = TypeVar("U")


@dataclass(frozen=True)
class EncodedSet(Generic[T]):
    """Examples within the length limit, and counts of those dropped or cut."""

    items: Sequence[T]
    """On disk, each read again when it is used."""
    kept: Sequence[int]
    """The example that each was made of."""
    n_dropped: int
    n_truncated: int
    longest: int
    n_tokens_cut: int = 0
    limit: int = sys.maxsize
    """Tokens that a row may have by the base."""

    def report(self, max_length: int) -> str | None:
        """Return a message on over-long examples; None where there were none."""
        if not self.n_dropped and not self.n_truncated:
            return None
        what = "dropped" if self.n_dropped else "truncated"
        n, total = self.n_dropped + self.n_truncated, len(self.items) + self.n_dropped
        limit = min(max_length, self.limit)
        message = f"{what} {n:,} of {total:,} examples longer than {limit:,} tokens "
        return f"{message}(longest {self.longest:,}){_cut(self.n_tokens_cut)}"


class Prompts(NamedTuple):
    """Prompts ready for generation, and what was cut out of them."""

    ids: list[list[int]]
    n_truncated: int = 0
    n_tokens_cut: int = 0
    limit: int = sys.maxsize
    """Tokens that they were cut to, so that an answer has room."""
    n_fewer_shots: int | None = None
    """How many show fewer worked examples than asked for; None where none are to be shown."""

    def report(self, max_length: int) -> str | None:
        """Return a message on what was cut, or left whole beyond the limit; None without any."""
        if self.n_fewer_shots is not None:  # shown whole whatever the limit
            return self._report_of_shots()
        n_long = sum(len(prompt) > max_length for prompt in self.ids)
        if n_long:
            return (
                f"{n_long:,} of {len(self.ids):,} prompts are longer than {max_length:,} tokens "
                "and left whole; --overlong truncate cuts them as in training"
            )
        if not self.n_truncated:
            return None
        message = f"truncated {self.n_truncated:,} of {len(self.ids):,} prompts longer than "
        return f"{message}{min(max_length, self.limit):,} tokens{_cut(self.n_tokens_cut)}"

    def _report_of_shots(self) -> str | None:
        if not self.n_fewer_shots:
            return None
        return (
            f"warning: {self.n_fewer_shots:,} of {len(self.ids):,} prompts show fewer worked "
            "examples than asked for, as the base has no room for more"
        )


def _cut(n_tokens: int) -> str:
    return f": {n_tokens:,} tokens cut from the middle of the longest fields" if n_tokens else ""


def encode_all(
    encoder: Encoder, examples: Sequence[Example], max_length: int, overlong: Overlong
) -> EncodedSet[Encoded]:
    """Encode examples and apply the length limit; of a preference the chosen completion counts.

    Raises:
        DataError: If examples cannot be encoded, are too long where `overlong` is `error`, or none
            is left.
    """
    return _limited(encoder.encode, encoder, examples, max_length, overlong)


def encode_pairs(
    encoder: Encoder, examples: Sequence[Example], max_length: int, overlong: Overlong
) -> EncodedSet[PreferencePair]:
    """Encode preferences and apply the length limit, to the longer completion of each.

    Raises:
        DataError: As `encode_all`.
    """
    return _limited(encoder.encode_pair, encoder, examples, max_length, overlong)


def encode_prompts(
    encoder: Encoder,
    examples: Sequence[Example],
    max_length: int,
    overlong: Overlong,
    room: int = 0,
) -> Prompts:
    """Encode prompts; longer ones are cut as in training where that is asked for, else whole.

    Args:
        encoder: Of the base and the chat format.
        examples: The rows.
        max_length: As in training.
        overlong: As in training.
        room: Tokens of an answer. Where prompts are cut they leave it, up to half of what the base
            takes.

    Raises:
        DataError: If examples cannot be encoded.
    """
    limit = min(max_length, encoder.n_positions - min(room, encoder.n_positions // 2))
    whole = every(encoder.prompt_of, examples)
    if overlong != "truncate":
        return Prompts(whole)
    ids = every(lambda example: encoder.prompt_of(example, limit), examples)
    cuts = [len(one) - len(other) for one, other in zip(whole, ids, strict=True)]
    return Prompts(ids, sum(n > 0 for n in cuts), sum(cuts), limit)


def answers_beyond(
    encoder: Encoder, examples: Sequence[Example], max_new_tokens: int
) -> str | None:
    """Return a message on gold answers too long to be generated; None where all fit."""
    lengths = [item.n_supervised for item in every(encoder.encode, examples)]
    longest = max(lengths, default=0)
    n_long = sum(n > max_new_tokens for n in lengths)
    if not n_long:
        return None
    return (
        f"{n_long:,} of {len(lengths):,} gold answers are longer than max_new_tokens "
        f"{max_new_tokens:,}, EOS included (longest {longest:,}), so no output can match them; "
        "raise it"
    )


def every(make: Callable[[Example], U], examples: Sequence[Example]) -> list[U]:
    """Return what is made of each example.

    Raises:
        DataError: If some cannot be encoded; all at once.
    """
    return list(_each(make, examples))


def _each(make: Callable[[Example], U], examples: Sequence[Example]) -> Iterator[U]:
    """Yield what is made of each example; those that cannot be encoded are an error at the end."""

    def tried(example: Example) -> U | str:
        try:
            return make(example)
        except DataError as error:
            return str(error)

    faults: list[str] = []
    for made in mapped(tried, examples):
        if isinstance(made, str):
            faults.append(made)
        else:
            yield made
    if faults:
        raise DataError(
            f"{len(faults)} of {len(examples)} rows cannot be encoded:\n{listed(faults)}"
        )


def _limited(
    encode: Callable[..., T],
    encoder: Encoder,
    examples: Sequence[Example],
    max_length: int,
    overlong: Overlong,
) -> EncodedSet[T]:
    items, lengths = Spool[T](), array("q")
    for item in _each(encode, examples):
        items.append(item)
        lengths.append(item.length)
    longest = max(lengths, default=0)
    limit = min(max_length, encoder.n_positions)
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    if too_long and overlong == "error":
        place = examples[too_long[0]].place
        where = f", the first is {place}" if place else ""
        own = limit < max_length
        named = f"the {limit} tokens that the base takes" if own else f"--max-length {limit} tokens"
        raise DataError(
            f"{len(too_long)} of {len(lengths)} examples are longer than {named} (the longest has "
            f"{longest}{where}); {'' if own else 'raise it, or '}set --overlong to drop or truncate"
        )
    if overlong == "drop":
        kept = array("q", (i for i, length in enumerate(lengths) if length <= limit))
        if not kept:
            least = min(range(len(lengths)), key=lengths.__getitem__)
            where = f", {examples[least].place}" if examples[least].place else ""
            raise DataError(
                f"no example is left within {limit} tokens (--max-length {max_length}): the "
                f"shortest has {lengths[least]}{where}"
            )
        left = Lazy(items.__getitem__, kept)
        return EncodedSet(left, kept, len(too_long), 0, longest, limit=limit)
    long, numbers, n_cut = Lazy(examples.__getitem__, too_long), array("q", range(len(items))), 0
    for index, cut in zip(too_long, _each(lambda e: encode(e, max_length), long), strict=True):
        n_cut += lengths[index] - cut.length
        numbers[index] = len(items)
        items.append(cut)
    shown, kept = Lazy(items.__getitem__, numbers), range(len(numbers))
    return EncodedSet(shown, kept, 0, len(too_long), longest, n_cut, limit)
