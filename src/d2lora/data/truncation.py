"""Rows longer than the limit lose the middle of their longest field.

Fields are what a row brings: its turns, the parts of a turn that stand between an instruction's
words, the answers. The instruction, system turns and the chat template stay whole. The head and
the tail of a field stay, so a text keeps its opening and a question its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from d2lora.data.rows import Example, Message, Span
from d2lora.errors import DataError

_LEAST = 8
"""A field of so few tokens is left alone as long as an instruction could be cut instead."""


class _Field(NamedTuple):
    """A piece of text of an example, and the example with another in its place."""

    text: str
    put: Callable[[str], Example]


def fitted(
    example: Example,
    length: Callable[[Example], int],
    max_length: int,
    spans: Callable[[str], Sequence[Span]],
) -> Example:
    """Return a row that is not longer than the limit.

    Args:
        example: The row.
        length: Its tokens.
        max_length: The limit.
        spans: Where each token of a text starts and ends.

    Raises:
        DataError: If what is not a field is longer than the limit by itself.
    """
    while (excess := length(example) - max_length) > 0:
        fields = [(field, spans(field.text)) for field in _fields(example)]
        if max((len(own) for _, own in fields), default=0) <= _LEAST:
            fields += [(field, spans(field.text)) for field in _instructions(example)]
        field, own = max(fields, key=lambda pair: len(pair[1]))
        if len(field.text) < 2:
            raise DataError(
                f"it cannot be cut to {max_length} tokens: the chat format alone has "
                f"{max_length + excess}; raise --max-length"
            )
        # By half at most: then another field may be the longest.
        example = field.put(_without_middle(field.text, own, min(excess, max(1, len(own) // 2))))
    return example


def _fields(example: Example) -> list[_Field]:
    found = [
        _part(example, place, span)
        for place, turn in enumerate(example.prompt)
        for span in _spans_of(turn)
    ]
    if example.completion and not example.more:  # calls are kept whole
        found.append(_Field(example.completion, lambda text: replace(example, completion=text)))
    if example.rejected:
        found.append(_Field(example.rejected, lambda text: replace(example, rejected=text)))
    return found


def _spans_of(turn: Message) -> tuple[Span, ...]:
    if turn.role == "system":
        return ()
    return ((0, len(turn.content)),) if turn.fields is None else turn.fields


def _instructions(example: Example) -> list[_Field]:
    found: list[_Field] = []
    for place, turn in enumerate(example.prompt):
        edges = [0, *(edge for span in _spans_of(turn) for edge in span), len(turn.content)]
        between = zip(edges[::2], edges[1::2], strict=True)
        found += [_part(example, place, span) for span in between if span[0] < span[1]]
    return found


def _part(example: Example, place: int, span: Span) -> _Field:
    """Return a part of a turn."""
    turn, (begin, end) = example.prompt[place], span

    def put(text: str) -> Example:
        by = len(text) - (end - begin)
        spans = tuple((b + by * (b >= end), e + by * (e >= end)) for b, e in _spans_of(turn))
        content = turn.content[:begin] + text + turn.content[end:]
        system = turn.role == "system"
        other = replace(turn, content=content, fields=None if system else spans)
        return replace(
            example, prompt=(*example.prompt[:place], other, *example.prompt[place + 1 :])
        )

    return _Field(turn.content[begin:end], put)


def _without_middle(text: str, spans: Sequence[Span], n_cut: int) -> str:
    """Return a text without some `n_cut` of its tokens, but never without all."""
    pieces = list(dict.fromkeys(spans))  # tokens of one character have one span
    most = max(1, len(pieces) * (len(spans) - n_cut) // len(spans))
    for n_kept in range(most, 0, -1):
        end = pieces[(n_kept + 1) // 2 - 1][1]
        behind = pieces[len(pieces) - n_kept // 2 :]
        begin = next((first for first, _ in behind if first > end), len(text))
        cut = _joined(text[:end], text[end:begin], text[begin:])
        if len(cut) < len(text):
            return cut
    return text[: len(text) // 2]


def _joined(head: str, gone: str, tail: str) -> str:
    """Join what is left of a text; what stood apart is kept apart by a space."""
    if tail and any(character.isspace() for character in head[-1] + gone + tail[0]):
        return f"{head.rstrip()} {tail.lstrip()}"
    return head + tail
