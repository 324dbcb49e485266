"""base + one adapter + test rows -> records of rows, held-out general loss, multiple choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from d2lora.adapters.base import Base
from d2lora.data.batches import Question
from d2lora.data.choices import ChoiceData, ChoiceQuestion, read_choice_questions
from d2lora.data.encode import Encoder, Format
from d2lora.data.encoded_sets import encode_all, encode_pairs, encode_prompts, every
from d2lora.data.rows import Example, Fault, Message
from d2lora.data.tasks import Say, TaskData, read_task
from d2lora.data.trained_rows import TestRow
from d2lora.errors import DataError, listed
from d2lora.evaluation.decoding import Decoder, check_room
from d2lora.evaluation.generate import adapted, chat_format_of, decode
from d2lora.evaluation.metrics import MAIN_SCORE, SCORERS, preference
from d2lora.runtime.console import Reporter
from d2lora.scoring.multiple_choice import continuation_scores
from d2lora.scoring.pairs import pair_log_probabilities
from d2lora.scoring.scorer import TokenScorer, mean_loss
from d2lora.settings import EvaluateSettings

BASE = "base"


@dataclass(frozen=True)
class TestSets:
    """What adapters are measured on; each may be empty."""

    __test__ = False  # not a class of tests

    task: TaskData | None
    general: list[Example]
    choices: list[ChoiceQuestion]
    whole_prompts: bool = False
    """Generate from prompts as they are, whatever the length limit."""
    rows: list[TestRow] = field(default_factory=list[TestRow])
    """All of them with their places, as they are in the files."""
    faults: list[Fault] = field(default_factory=list[Fault])
    """Bad rows that were skipped."""

    @classmethod
    def read(cls, settings: EvaluateSettings, say: Say | None = None) -> "TestSets":
        """Read the test rows that the settings name; `say` gets the formats of their rows.

        Raises:
            DataError: If rows are bad, or the task has no scored output.
        """
        skip_bad = settings.skip_bad_rows
        task = general = choices = None
        if settings.data:
            task = read_task(settings.data, settings.task, skip_bad=skip_bad, say=say)
        if task is not None and task.task.score not in MAIN_SCORE:
            raise DataError(
                f"task {task.task.name} has no answers to score; give the rows as --general-text"
            )
        if settings.general_text:
            general = read_task(settings.general_text, skip_bad=skip_bad, say=say)
        if settings.choices:
            choices = read_choice_questions(settings.choices, skip_bad=skip_bad, say=say)
        rows = [
            *_placed("task", task, settings.limit),
            *_placed("general_text", general, None),
            *_placed_choices(choices),
        ]
        return cls(
            task,
            list(general.examples) if general else [],
            choices.questions if choices else [],
            rows=rows,
            faults=[fault for data in (task, general, choices) if data for fault in data.faults],
        )


def _placed(use: str, data: TaskData | None, limit: int | None) -> list[TestRow]:
    if data is None:
        return []
    digests = _digests(data)
    pairs = zip(data.rows[:limit], data.examples[:limit], strict=True)
    return [TestRow(use, r.file, r.line, e.text, digests[r.file]) for r, e in pairs]


def _placed_choices(data: ChoiceData | None) -> list[TestRow]:
    """Return the test rows of questions, each with its right answer."""
    if data is None:
        return []
    digests = _digests(data)
    return [
        TestRow("choices", r.file, r.line, f"{q.prompt}\n{q.choices[q.answer]}", digests[r.file])
        for r, q in zip(data.rows, data.questions, strict=True)
    ]


def _digests(data: TaskData | ChoiceData) -> dict[str, str]:
    return {str(source["file"]): str(source["sha256"]) for source in data.sources}


@dataclass(frozen=True)
class Measured:
    """What is measured of one adapter."""

    records: list[dict[str, Any]]
    general_loss: float | None
    right: np.ndarray[tuple[int], np.dtype[np.float64]] | None
    """1 for each multiple-choice question answered right, else 0."""
    fast_passes: list[str]
    """Names of the fast paths that were used."""
    chat_format: Format
    """That it was prompted in."""


def measure(
    name: str, base: Base, sets: TestSets, settings: EvaluateSettings, reporter: Reporter
) -> Measured:
    """Measure one adapter (a folder), or the base alone (`base`), on every set."""
    path = None if name == BASE else Path(name)
    with adapted(base, path, fast_when=settings.fast) as (model, used):
        encoder = Encoder.of(base, chat_format_of(path, settings.chat_format))
        return Measured(
            _score_task(model, base, encoder, name, sets, settings, reporter),
            _general_loss(model, base, encoder, sets.general, settings, reporter),
            _right_choices(model, base, encoder, sets.choices),
            used.names,
            encoder.format,
        )


def _score_task(
    model: nn.Module,
    base: Base,
    encoder: Encoder,
    name: str,
    sets: TestSets,
    settings: EvaluateSettings,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    data = sets.task
    if data is None:
        return []
    examples = data.examples[: settings.limit]
    if data.task.score == "preference":
        return _score_preferences(model, base, encoder, name, examples, settings, reporter)
    scorer = SCORERS[data.task.score]
    decoder = Decoder(model, base, settings.max_new_tokens, settings.batch_size)
    overlong = "error" if sets.whole_prompts else settings.overlong
    prompts = encode_prompts(encoder, examples, settings.max_length, overlong)
    _say(prompts.report(settings.max_length), reporter)
    places = [example.place for example in examples]
    _say(check_room(prompts.ids, places, model, settings.max_new_tokens), reporter)
    records: dict[int, dict[str, Any]] = {}
    with reporter.bar("generating", len(examples)) as bar:
        for index, ids in decoder.complete(prompts.ids):
            records[index] = _record(
                name, index, examples[index], decode(base, ids), len(ids), scorer
            )
            bar.update(len(records))
    return [records[index] for index in range(len(examples))]


def check_rows(
    names: Sequence[str], base: Base, sets: TestSets, settings: EvaluateSettings
) -> None:
    """Check, before anything is measured, that the base can take the test rows of all adapters.

    Raises:
        DataError: If prompts leave no room for an answer, or choices do not fit; it names all. If
            chat formats differ so that over-long rows dropped of one adapter's are not the others'.
    """
    data = sets.task
    kept: set[tuple[int, ...]] = set()
    folders = [None if name == BASE else Path(name) for name in names]
    for chat_format in {chat_format_of(folder, settings.chat_format) for folder in folders}:
        encoder = Encoder.of(base, chat_format)
        if data is not None and data.task.score == "preference":
            examples = data.examples[: settings.limit]
            pairs = encode_pairs(encoder, examples, settings.max_length, settings.overlong)
            kept.add(tuple(pairs.kept))
        elif data is not None:
            examples = data.examples[: settings.limit]
            overlong = "error" if sets.whole_prompts else settings.overlong
            prompts = encode_prompts(encoder, examples, settings.max_length, overlong)
            places = [example.place for example in examples]
            check_room(prompts.ids, places, base.model, settings.max_new_tokens)
        questions_of(encoder, sets.choices)
    if len(kept) > 1:
        raise DataError(
            "the adapters were trained in different chat formats, in which --overlong drop leaves "
            "other rows; give one --chat-format to all, or --overlong truncate"
        )


def _score_preferences(
    model: nn.Module,
    base: Base,
    encoder: Encoder,
    name: str,
    examples: Sequence[Example],
    settings: EvaluateSettings,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Record how likely both completions of each pair are; over-long rows follow the settings."""
    encoded = encode_pairs(encoder, examples, settings.max_length, settings.overlong)
    _say(encoded.report(settings.max_length), reporter)
    records: list[dict[str, Any]] = []
    sums = pair_log_probabilities(TokenScorer(model).eval(), encoded.items, base.pad_id)
    for index, pair, (chosen, rejected) in zip(encoded.kept, encoded.items, sums, strict=True):
        lengths = (pair.chosen.n_supervised, pair.rejected.n_supervised)
        example = examples[index]
        records.append(
            {
                "adapter": name,
                "row": index,
                "prompt": example.prompt[-1].content,
                "chosen": example.completion,
                "rejected": example.rejected,
                "log_probability_chosen": chosen,
                "log_probability_rejected": rejected,
                **preference((chosen, rejected), lengths),
            }
        )
    return records


def _record(
    name: str,
    index: int,
    example: Example,
    output: str,
    n_tokens: int,
    scorer: Callable[[str, str], dict[str, float]],
) -> dict[str, Any]:
    return {
        "adapter": name,
        "row": index,
        "prompt": example.prompt[-1].content,
        "target": example.completion,
        "output": output,
        "n_output_tokens": n_tokens,
        **scorer(output, example.completion),
    }


def _general_loss(
    model: nn.Module,
    base: Base,
    encoder: Encoder,
    examples: Sequence[Example],
    settings: EvaluateSettings,
    reporter: Reporter,
) -> float | None:
    if not examples:
        return None
    encoded = encode_all(encoder, examples, settings.max_length, settings.overlong)
    _say(encoded.report(settings.max_length), reporter)
    return mean_loss(TokenScorer(model).eval(), encoded.items, base.pad_id)


def _right_choices(
    model: nn.Module, base: Base, encoder: Encoder, questions: Sequence[ChoiceQuestion]
) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    """Return 1 for each question whose right choice is likeliest per character, else 0.

    Normalised as `acc_norm` of lm-evaluation-harness: log-probability over characters.
    """
    if not questions:
        return None
    rows = questions_of(encoder, questions)
    scores = continuation_scores(TokenScorer(model), rows, base.pad_id)
    right: list[float] = []
    for question, by_choice in zip(questions, scores, strict=True):
        per_character = [s / len(c) for s, c in zip(by_choice, question.choices, strict=True)]
        likeliest = question.choices[int(np.argmax(per_character))]
        right.append(float(likeliest == question.choices[question.answer]))  # it may come twice
    return np.array(right)


def questions_of(encoder: Encoder, questions: Sequence[ChoiceQuestion]) -> list[Question]:
    """Return multiple-choice questions as token ids; a choice's EOS is not scored.

    Raises:
        DataError: If some are longer than what the base takes; it names all.
    """
    rows: list[Question] = []
    for number, question in enumerate(questions, 1):
        prompt, place = (Message("user", question.prompt),), f"multiple-choice question {number}"
        endings = [Example(prompt, choice, place=place) for choice in question.choices]
        whole = every(encoder.encode, endings)
        endings = tuple(w.ids[w.n_prompt : -1] for w in whole)
        rows.append(Question(whole[0].ids[: whole[0].n_prompt], endings))
    lengths = [len(row.prompt) + max(map(len, row.endings)) for row in rows]
    beyond = [
        f"question {number}: {length:,} tokens"
        for number, length in enumerate(lengths, 1)
        if length > encoder.n_positions
    ]
    if beyond:
        raise DataError(
            f"{len(beyond)} of {len(rows)} multiple-choice questions are longer than the "
            f"{encoder.n_positions:,} tokens that the base takes; shorten them or leave them "
            f"out:\n{listed(beyond)}"
        )
    return rows


def _say(message: str | None, reporter: Reporter) -> None:
    if message is not None:
        reporter.say(message)
