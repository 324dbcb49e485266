"""Contamination: rows of training data that overlap with evaluation data.

A training row is contaminated where it shares n consecutive words (13, as in Brown et al. 2020,
arXiv 2005.14165, appendix C) with an evaluation row, asks the same question, or holds a whole
question that is itself shorter than n words. Words that more than ten evaluation rows have in
common, five in a row, are the wording of a template: of what is shared, at least eight others are
needed. In the paper it is what more than ten training documents have in common, which a small set
of task rows cannot show.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from d2lora.data.choices import read_choice_question
from d2lora.data.ngrams import Hashes, gram_hashes, word_hashes, words
from d2lora.data.processes import mapped
from d2lora.data.rows import BadRowError, Example, Fault, place, user
from d2lora.data.sources import Row, read_source
from d2lora.data.tasks import AUTO, layout_of, task_of
from d2lora.errors import DataError, counted, listed

N_WORDS = 13
"""Consecutive words that no two texts share by chance."""
COMMON = 10
"""What more evaluation rows than this share is a template."""
SHORTEST_INSIDE = 8
"""A question of fewer words is compared with whole prompts only, the words of templates apart."""
TEMPLATE_WORDS = 5
"""Words in a row that more than `COMMON` rows share by a template alone."""

# Between numbers the operator alone distinguishes one calculation from another.
_OPERATOR = re.compile(r"(?<=\d)\s*([-+*/^<>=×÷−])\s*(?=\d)")


@dataclass(frozen=True)
class Leak:
    """A training row that overlaps with an evaluation row."""

    index: int
    """Of the training row among those checked."""
    file: str
    line: int
    """Where the evaluation row stands."""
    how: str

    @property
    def reason(self) -> str:
        """The reason for removing it."""
        return f"contaminated: {self.how} {place(self.file, self.line)}"

    def as_fault(self, row: Row) -> Fault:
        """Return the training row as a bad row, with the reason."""
        return row.fault(self.reason)


@dataclass(frozen=True)
class _Item:
    """An evaluation row, hashed word by word."""

    file: str
    line: int
    asked: int
    """Digest of the question."""
    question: Hashes
    whole: Hashes


class Guard:
    """Holds the texts of evaluation files, and finds training rows that overlap with them."""

    def __init__(
        self, files: Sequence[str], n_words: int = N_WORDS, tasks: Mapping[str, str] | None = None
    ) -> None:
        """Read the evaluation files, of any kind of row.

        Args:
            files: Evaluation files or hub data sets.
            n_words: Consecutive shared words that make a leak. 0: only the same question counts.
            tasks: File -> its task, as for `task_of`. Rows that this does not read, and those of
                other files, are read as what their fields say, or as all their texts.

        Raises:
            DataError: If a file cannot be read.
        """
        self.files = tuple(files)
        self.n_words = n_words
        self._items = [
            item for name in files for item in _items(name, (tasks or {}).get(name, AUTO))
        ]
        self._questions = _without_common(
            (item.asked, number) for number, item in enumerate(self._items) if len(item.question)
        )  # fmt: skip
        self._template = _common_grams(item.whole for item in self._items)
        # Hashes of each length in order, with the evaluation row that each stands for.
        self._grams: dict[int, tuple[Hashes, list[int]]] = {}
        for length in range(min(SHORTEST_INSIDE, n_words), n_words + 1) if n_words else ():
            owners = _without_common(self._pairs(length))
            if owners:
                hashes = np.sort(np.fromiter(owners, dtype=np.uint64, count=len(owners)))
                self._grams[length] = (hashes, [owners[int(value)] for value in hashes])
        self.n_rows = len(self._items)
        """Number of evaluation rows."""

    def _pairs(self, length: int) -> Iterator[tuple[int, int]]:
        """Return hash and row of the n-grams, or of the questions of just a shorter length."""
        for number, item in enumerate(self._items):
            if length == self.n_words:
                for value in set(self._telling(item.whole, length).tolist()):
                    yield value, number
            elif len(item.question) == length:
                for value in self._telling(item.question, length).tolist():
                    yield value, number

    def _telling(self, hashes: Hashes, length: int) -> Hashes:
        """Return the n-grams of a row that have enough words which are not a template's."""
        own = np.ones(len(hashes), dtype=np.int64)
        for begin in np.flatnonzero(np.isin(gram_hashes(hashes, TEMPLATE_WORDS), self._template)):
            own[begin : begin + TEMPLATE_WORDS] = 0
        up_to = np.concatenate([[0], np.cumsum(own)])
        n_own = up_to[length:] - up_to[:-length]
        return gram_hashes(hashes, length)[n_own >= min(length, SHORTEST_INSIDE)]

    def leaks(self, examples: Sequence[Example]) -> Iterator[Leak]:
        """Find the examples that overlap with an evaluation row, one leak each."""
        found = mapped(lambda index: self.leak(index, examples[index]), range(len(examples)))
        return (leak for leak in found if leak is not None)

    def leak(self, index: int, example: Example) -> Leak | None:
        """Return what a training row overlaps with; None where it is clean."""
        asked = (turn.content for turn in example.prompt if turn.role == "user")
        for text in {example.question, *asked} - {""}:
            number = self._questions.get(_digest(text))
            if number is not None:
                return self._leak(index, number, "asks the same question as")
        whole = word_hashes(words(example.text))
        for length in sorted(self._grams, reverse=True):
            known, owners = self._grams[length]
            mine = gram_hashes(whole, length)
            places = np.searchsorted(known, mine)
            places[places == len(known)] = 0
            hits = np.flatnonzero(known[places] == mine)
            if len(hits):
                how = f"shares {length} consecutive words with"
                return self._leak(index, owners[places[hits[0]]], how)
        return None

    def _leak(self, index: int, number: int, how: str) -> Leak:
        item = self._items[number]
        return Leak(index, item.file, item.line, how)


def leaks_of(guards: Iterable[Guard], examples: Sequence[Example]) -> dict[int, Leak]:
    """Return what any guard finds, by the index of the training row."""
    return {leak.index: leak for guard in guards for leak in guard.leaks(examples)}


def _common_grams(rows: Iterable[Hashes]) -> Hashes:
    """Return the short n-grams that more than `COMMON` rows have."""
    own = [np.unique(gram_hashes(row, TEMPLATE_WORDS)) for row in rows]
    if not own:
        return np.empty(0, dtype=np.uint64)
    grams, counts = np.unique(np.concatenate(own), return_counts=True)
    return grams[counts > COMMON]


def _without_common(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return hash -> first row, less the hashes that more than `COMMON` rows have."""
    owner: dict[int, int] = {}
    more: dict[int, int] = {}
    for value, number in pairs:
        if value in owner:
            more[value] = more.get(value, 1) + 1
        else:
            owner[value] = number
    for value, count in more.items():
        if count > COMMON:
            del owner[value]
    return owner


def _digest(question: str) -> int:
    """Return a hash of a question's words and of the operators between its numbers."""
    return xxhash.xxh3_64_intdigest(word_hashes(normalized(question)).tobytes())


def normalized(text: str) -> list[str]:
    """Return a text's words and the operators between its numbers, which identify it."""
    return [*words(text), *_OPERATOR.findall(text)]


def _items(name: str, task: str) -> Iterator[_Item]:
    source = read_source(name, layout_of(task))
    if source.faults:
        raise DataError(
            f"{name}: {counted(len(source.faults), 'row')} cannot be checked for contamination:\n"
            f"{listed([str(fault) for fault in source.faults])}"
        )
    for row in source.rows:
        example = _read(row.values, task)
        asked = example.question if words(example.question) else example.text
        question, whole = word_hashes(words(asked)), word_hashes(words(example.text))
        yield _Item(row.file, row.line, _digest(asked), question, whole)


def _read(values: dict[str, Any], task: str) -> Example:
    """Read an evaluation row, whatever its kind; of an unknown one, all its texts."""
    named, detected = task_of(task, values), task_of(AUTO, values)
    readers: tuple[Any, ...] = (named.read, detected.read, _choice, named.ask, detected.ask)
    for read in readers:
        try:
            example: Example = read(values)
        except (BadRowError, ValueError, TypeError, KeyError):
            continue
        return example
    return Example((), "\n".join(_texts(values)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _choice(values: dict[str, Any]) -> Example:
    return Example(user(read_choice_question(values).prompt), "")
