"""Cleaning a pool of examples: what is removed, at which step, and why.

Each step looks at what the steps before it left. Nothing is thrown away: a rejected row is kept
with the step and the reason, so a step can be undone by hand.

    contaminated, empty, truncated, echo, refusal, boilerplate, repetitive, language, length,
    duplicate, near_duplicate, source_cap

The rules of text are those of C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2) and Gopher
(Rae et al. 2021, arXiv 2112.11446, appendix A.1) that make sense for an answer.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from d2lora.data.contamination import Guard
from d2lora.data.encode import Encoder
from d2lora.data.ngrams import gram_hashes, word_hashes, words
from d2lora.data.reading import TaskData
from d2lora.data.rows import Example, place
from d2lora.data.sources import nested_order
from d2lora.errors import DataError, SettingsError, counted
from d2lora.runtime.console import Reporter
from d2lora.selection.duplicates import Duplicates
from d2lora.settings import HygieneSettings

STEPS = (
    "contaminated", "empty", "truncated", "echo", "refusal", "boilerplate", "repetitive",
    "language", "length", "duplicate", "near_duplicate", "source_cap",
)  # fmt: skip
"""In order; rows that cannot be read, or that the chat template
refuses, are `unreadable`."""

_OPENING = r"^\W*(?:(?:oh|well|hi|hello|unfortunately|thank you)\b\W*)*"
_REFUSAL = re.compile(
    _OPENING + r"(?:(?:i['’]?m|i am)\W+(?:(?:really|very|so)\W+)?(?:sorry|afraid)\b"
    r"[^.]{0,60}\b(?:can(?:not|['’]?t)|unable|not able|won['’]?t|as an ai|do(?:n['’]t| not))\b"
    r"|as an? (?:ai|artificial intelligence|large language|language) (?:language )?(?:model|assist)"
    r"|i (?:can(?:not|['’]?t)|am unable to|['’]m unable to|won['’]?t|am not able to) "
    r"(?:help|assist|fulfil|provide|comply|engage|create|generate|answer|complete|do that)"
    r"|(?:my apologies|i apologi[sz]e)[^.]{0,60}\b(?:can(?:not|['’]?t)|unable))",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"lorem ipsum|enable javascript|javascript is (?:disabled|required)|(?:uses?|accept) cookies|"
    r"cookie policy|all rights reserved|terms of (?:use|service) and privacy|"
    r"click here to (?:subscribe|sign up|register)|sign up for our newsletter|"
    r"knowledge cut-?off|\[insert [^\]]{1,40}\]|\b(?:page|content) not found\b",
    re.IGNORECASE,
)
_OPEN_END = re.compile(r"(?:[,;:(\[{-]|\b(?:and|or|but|the|a|an|of|to|with|in|for|because|that))$")
_SIGN = re.compile(r"[^\s.,;:!?'\"-]")  # an emoji or a formula answers without a word
_SENTENCE_END = re.compile(r"[.!?…。！？]['\"”’)\]*]*(?:\s|$)")
_ECHO_WORDS = 8
_LONG_ANSWER, _FEW_DISTINCT = 30, 0.4


@dataclass(frozen=True)
class Rejected:
    """A row that was removed."""

    index: int
    """Of its example in the pool."""
    step: str
    reason: str


@dataclass(frozen=True)
class Cleaned:
    """What is left of a pool (indices of its examples) and what was removed from it."""

    kept: list[int]
    rejected: list[Rejected]
    counts: dict[str, int]
    """Rows removed at each step, steps without any and `unreadable` included."""

    def report(self) -> str:
        """Return a one-line report."""
        by_step = ", ".join(f"{step} {n:,}" for step, n in self.counts.items() if n) or "none"
        n_rejected = sum(self.counts.values())
        return (
            f"hygiene: {counted(len(self.kept), 'row')} kept, {n_rejected:,} rejected ({by_step})"
        )


def clean(
    pool: TaskData, settings: HygieneSettings, encoder: Encoder | None, seed: int,
    reporter: Reporter,
) -> Cleaned:  # fmt: skip
    """Remove from a pool what should not be trained on.

    Args:
        pool: Its examples, with the rows that could not be read.
        settings: The limits, and the evaluation files to keep out.
        encoder: Counts tokens for the length limit. None: no limit.
        seed: Seed of the rows that a source cap keeps.
        reporter: Where progress is shown.

    Raises:
        DataError: If an evaluation file cannot be read.
        SettingsError: If a language is not known.
    """
    judge = _row_judge(settings, encoder)
    memory = Duplicates(settings.near_duplicates, pool.examples)
    kept: list[int] = []
    rejected: list[Rejected] = []
    with reporter.bar("hygiene", len(pool.examples)) as bar:
        for index, example in enumerate(pool.examples):
            found = judge(index, example) or _repeats(memory, index, example, pool)
            if found is None:
                kept.append(index)
            else:
                rejected.append(Rejected(index, *found))
            if index % 256 == 0:
                bar.update(index)
    if settings.source_cap is not None:
        kept = _capped(kept, pool, settings.source_cap, seed, rejected)
    counted = Counter(item.step for item in rejected)
    unreadable = len(pool.faults) + counted["unreadable"]
    counts = {"unreadable": unreadable, **{step: counted[step] for step in STEPS}}
    return Cleaned(kept, rejected, counts)


Finding = tuple[str, str] | None


def _row_judge(
    settings: HygieneSettings, encoder: Encoder | None
) -> Callable[[int, Example], Finding]:
    """Return the check of one row by itself: step and reason, or None."""
    guard = Guard(settings.keep_out, settings.keep_out_words) if settings.keep_out else None
    languages = frozenset(settings.languages)
    if languages:
        check_languages(languages)

    def judge(index: int, example: Example) -> Finding:
        leak = guard.leak(index, example) if guard else None
        finding = ("contaminated", leak.reason) if leak else answer_fault(example)
        if finding is None and languages:
            found = language_of(example.text)
            if found not in languages:
                finding = ("language", f"the language is {found}")
        if finding is None and encoder is not None:
            finding = _length_fault(encoder, example, settings.max_length)
        return finding

    return judge


def _length_fault(encoder: Encoder, example: Example, max_length: int) -> Finding:
    try:
        n_tokens = encoder.encode(example).length
    except DataError as error:  # a chat template refuses it
        return "unreadable", str(error)
    if n_tokens > max_length:
        return "length", f"{n_tokens} tokens, more than {max_length}"
    return None


def answer_fault(example: Example) -> Finding:
    """Return what is wrong with an answer by itself: step and reason, or None."""
    return next(_answer_faults(example), None)


def _answer_faults(example: Example) -> Iterator[tuple[str, str]]:
    answer = example.completion.strip()
    its_words = words(answer)
    if not its_words and not _SIGN.search(answer):
        yield "empty", "the answer has no words"
    if _REFUSAL.search(answer):
        yield "refusal", f"the answer refuses: {answer[:60]!r}"
    if match := _BOILERPLATE.search(answer):
        yield "boilerplate", f"the answer contains {match.group()!r}"
    if reason := _truncated(answer, its_words):
        yield "truncated", reason
    asked = words(example.question)
    if len(asked) >= _ECHO_WORDS and its_words[: len(asked)] == asked:
        yield "echo", "the answer starts with the whole prompt"
    if len(its_words) >= _LONG_ANSWER:
        trigrams = gram_hashes(word_hashes(its_words), 3)
        share = len(set(trigrams.tolist())) / len(trigrams)
        if share < _FEW_DISTINCT:
            yield "repetitive", f"only {share:.0%} of the answer's 3-grams are distinct"


def _truncated(answer: str, its_words: Sequence[str]) -> str | None:
    """Return why an answer looks cut off: an open code block, or sentences and then an open end."""
    if answer.count("```") % 2:
        return "the answer ends inside a code block"
    sentences = len(_SENTENCE_END.findall(answer))
    if len(its_words) >= _LONG_ANSWER and sentences >= 2 and _OPEN_END.search(answer):
        return f"the answer ends in mid-sentence: {answer[-40:]!r}"
    return None


def _repeats(memory: Duplicates, index: int, example: Example, pool: TaskData) -> Finding:
    found = memory.add(index, example)
    if found is None:
        return None
    first = pool.rows[found.of]
    where = place(first.file, first.line)
    if found.similarity == 1:
        return "duplicate", f"the same as {where}"
    return "near_duplicate", f"{found.similarity:.0%} similar to {where}"


def _capped(
    kept: Sequence[int], pool: TaskData, cap: int, seed: int, rejected: list[Rejected]
) -> list[int]:
    """Keep a seeded subset of at most `cap` rows of each source."""
    taken: Counter[str] = Counter()
    left: list[int] = []
    for position in nested_order(len(kept), seed):
        index = kept[position]
        name = source_of(pool, index)
        taken[name] += 1
        if taken[name] <= cap:
            left.append(index)
        else:
            reason = f"source {name} already has {cap} rows"
            rejected.append(Rejected(index, "source_cap", reason))
    return sorted(left)


def source_of(pool: TaskData, index: int) -> str:
    """Return the source of a row: its field `source`, else its file."""
    named = pool.rows[index].values.get("source")
    return named if isinstance(named, str) and named else pool.rows[index].file


def check_languages(languages: Iterable[str]) -> None:
    """Check that language codes are known.

    Raises:
        SettingsError: If one is not.
    """
    import py3langid

    known = {code for code, _ in py3langid.rank("")}
    unknown = sorted(set(languages) - known)
    if unknown:
        raise SettingsError(
            f"--languages: `{unknown[0]}` is not a known ISO 639-1 code; known: "
            f"{' '.join(sorted(known))}"
        )


def language_of(text: str) -> str:
    """Return the likeliest language, an ISO 639-1 code (langid.py, Lui and Baldwin 2012)."""
    import py3langid

    code, _ = py3langid.classify(text[:2000])
    return code
