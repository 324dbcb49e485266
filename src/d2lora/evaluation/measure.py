"""base + one adapter + test rows -> records of rows, held-out general loss, multiple choice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from d2lora.adapters.base import Base
from d2lora.adapters.manifest import base_for
from d2lora.data.batches import Question
from d2lora.data.chat_text import Format
from d2lora.data.choices import ChoiceQuestion
from d2lora.data.encode import Encoder
from d2lora.data.encoded_sets import Prompts, encode_all, encode_pairs, encode_prompts, every
from d2lora.data.options import Per
from d2lora.data.rows import Example, Message
from d2lora.data.shots import with_shots
from d2lora.data.tasks import Task
from d2lora.errors import DataError, listed
from d2lora.evaluation.closed import choose_labels, longest_answer
from d2lora.evaluation.closed import questions_of as label_questions
from d2lora.evaluation.counts import Column
from d2lora.evaluation.decoding import Decoder, check_room
from d2lora.evaluation.generate import adapted, decode, encoder_of
from d2lora.evaluation.metrics import preference
from d2lora.evaluation.outputs import columns_of_outputs, records_of, with_scores
from d2lora.evaluation.test_sets import TestSets
from d2lora.runtime.console import Reporter
from d2lora.scoring.multiple_choice import continuation_scores
from d2lora.scoring.pairs import pair_log_probabilities
from d2lora.scoring.scorer import TokenScorer, mean_loss
from d2lora.settings import EvaluateSettings

BASE = "base"


@dataclass(frozen=True)
class TaskScores:
    """What is measured on the task's test rows."""

    records: list[dict[str, Any]]
    """One per row, with its scores."""
    columns: dict[str, Column]
    """The scores, the main one first."""


@dataclass(frozen=True)
class Measured:
    """What is measured of one adapter."""

    task: TaskScores
    general_loss: float | None
    right: np.ndarray[tuple[int], np.dtype[np.float64]] | None
    """1 for each multiple-choice question answered right, else 0."""
    fast_passes: list[str]
    """Names of the fast paths that were used."""
    way: tuple[Format, str]
    """The chat format and the template that it was prompted in."""


def measure(
    name: str,
    base: Base,
    sets: TestSets,
    settings: EvaluateSettings,
    reporter: Reporter,
    prompted_as: str | None = None,
) -> Measured:
    """Measure one adapter (a folder), or the base alone (`base`), on every set.

    It is prompted in its own chat format, or in that of the adapter `prompted_as`.
    """
    path, own = (None if n == BASE else Path(n) for n in (name, prompted_as or name))
    base = base_for(base, path)
    with adapted(base, path, fast_when=settings.fast) as (model, used):
        encoder = encoder_of(own, base, settings.chat_format)
        measured = Measured(
            _score_task(model, base, encoder, name, sets, settings, reporter),
            _general_loss(model, base, encoder, sets.general, settings, reporter),
            _right_choices(model, base, encoder, sets.choices),
            used.names,
            _way(encoder),
        )
    if sets.harness_task is None and not sets.harness_choices:
        return measured
    with adapted(base, path, fast_when=False) as (model, _):
        return _with_harness(measured, model, base, name, sets, settings)


def _with_harness(
    measured: Measured,
    model: nn.Module,
    base: Base,
    name: str,
    sets: TestSets,
    settings: EvaluateSettings,
) -> Measured:
    """Add what lm-evaluation-harness measures."""
    if sets.harness_task is not None:
        own = sets.harness_task.scores(model, base, settings.limit, quiet=settings.quiet)
        records = [{"adapter": name, **record} for record in own.records]
        task = TaskScores(with_scores(records, own.columns), own.columns)
        measured = replace(measured, task=task)
    if sets.harness_choices:
        right = [] if measured.right is None else [measured.right]
        more = [t.right(model, base, quiet=settings.quiet) for t in sets.harness_choices]
        measured = replace(measured, right=np.concatenate([*right, *map(np.array, more)]))
    return measured


def _way(encoder: Encoder) -> tuple[Format, str]:
    return encoder.format, "" if encoder.format == "plain" else str(encoder.tokenizer.chat_template)


def _score_task(
    model: nn.Module,
    base: Base,
    encoder: Encoder,
    name: str,
    sets: TestSets,
    settings: EvaluateSettings,
    reporter: Reporter,
) -> TaskScores:
    data = sets.task
    if data is None:
        return TaskScores([], {})
    data = replace(data, examples=[encoder.as_written(example) for example in data.examples])
    examples = data.examples[: settings.limit]
    if data.task.answers == "pairs":
        return _score_preferences(model, base, encoder, name, examples, settings, reporter)
    if data.task.answers == "closed":
        return _score_closed(model, base, encoder, name, sets, settings, reporter)
    decoder = Decoder(model, base, settings.max_new_tokens, settings.batch_size, say=reporter.say)
    prompts = prompts_of(encoder, sets, settings)
    _say(prompts.report(settings.max_length), reporter)
    places = [example.place for example in examples]
    _say(check_room(prompts.ids, places, model, settings.max_new_tokens), reporter)
    outputs: dict[int, tuple[str, int]] = {}
    marks = data.task.card.thoughts.split()
    with reporter.bar("generating", len(examples)) as bar:
        for index, ids in decoder.complete(prompts.ids):
            outputs[index] = decode(base, ids, marks), len(ids)
            bar.update(len(outputs))
    said = [outputs[index] for index in range(len(examples))]
    texts = [output for output, _ in said]
    columns = columns_of_outputs(data, texts)
    records = [
        {**record, "n_output_tokens": n_tokens}
        for record, (_, n_tokens) in zip(records_of(name, examples, texts), said, strict=True)
    ]
    return TaskScores(with_scores(records, columns), columns)


def _score_closed(
    model: nn.Module,
    base: Base,
    encoder: Encoder,
    name: str,
    sets: TestSets,
    settings: EvaluateSettings,
    reporter: Reporter,
) -> TaskScores:
    """Record the likeliest label of each row, and how sure the model is of it."""
    data = sets.task
    assert data is not None
    examples = data.examples[: settings.limit]
    prompts = prompts_of(encoder, sets, settings)
    _say(prompts.report(settings.max_length), reporter)
    per = _per(data.task)
    chosen = choose_labels(model, base, encoder, examples, prompts.ids, sets.labels, per)
    labels = [one.label for one in chosen]
    columns = columns_of_outputs(data, labels)
    records = [
        {**record, **({} if one.confidence is None else {"confidence": one.confidence})}
        for record, one in zip(records_of(name, examples, labels), chosen, strict=True)
    ]
    return TaskScores(with_scores(records, columns), columns)


def _per(task: Task) -> Per:
    return task.card.choices.per if task.card.choices else "answer"


def prompts_of(encoder: Encoder, sets: TestSets, settings: EvaluateSettings) -> Prompts:
    """Return the prompts of the task's test rows as token ids."""
    assert sets.task is not None
    examples = sets.task.examples[: settings.limit]
    room = settings.max_new_tokens
    if sets.task.task.answers == "closed" and examples:
        room = longest_answer(encoder, examples, sets.labels)
    if not sets.shots:
        return encode_prompts(encoder, examples, settings.max_length, settings.overlong, room)
    prompted = with_shots(encoder, examples, sets.shots, room)
    return Prompts(every(encoder.prompt_of, prompted.examples), n_fewer_shots=prompted.n_fewer)


def encoders_of(names: Iterable[str], base: Base, settings: EvaluateSettings) -> list[Encoder]:
    """Return an encoder for each way in which adapters are prompted, new tokens among it."""
    folders = [None if name == BASE else Path(name) for name in names]
    bases = [base_for(base, folder) for folder in folders]
    encoders = {
        (_way(encoder), own.new_tokens): encoder
        for folder, own in zip(folders, bases, strict=True)
        for encoder in (encoder_of(folder, own, settings.chat_format),)
    }
    return list(encoders.values())


def check_rows(
    names: Sequence[str], base: Base, sets: TestSets, settings: EvaluateSettings
) -> None:
    """Check, before anything is measured, that the base can take the test rows of all adapters.

    Raises:
        DataError: If prompts leave no room for an answer, or choices do not fit; it names all. If
            chat formats differ so that over-long rows dropped of one adapter's are not the others'.
    """
    kept: set[tuple[int, ...]] = set()
    for encoder in encoders_of(names, base, settings):
        questions_of(encoder, sets.choices)
    data = sets.task
    if data is None:
        return
    examples = data.examples[: settings.limit]
    for encoder in encoders_of(settings.adapters or (BASE,), base, settings):
        if data.task.answers == "pairs":
            pairs = encode_pairs(encoder, examples, settings.max_length, settings.overlong)
            kept.add(tuple(pairs.kept))
        if data.task.answers in ("open", "closed"):
            prompts = prompts_of(encoder, sets, settings)
            if data.task.answers == "closed":
                label_questions(encoder, examples, prompts.ids, sets.labels, _per(data.task))
            else:
                places = [example.place for example in examples]
                check_room(prompts.ids, places, base.model, settings.max_new_tokens)
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
) -> TaskScores:
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
    names = preference((0.0, 0.0), (1, 1))
    columns = {name: np.array([record[name] for record in records]) for name in names}
    return TaskScores(records, dict[str, Column](columns))


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
    """Return multiple-choice questions as token ids; of a choice its text alone is scored.

    Raises:
        DataError: If some are longer than what the base takes; it names all.
    """
    rows: list[Question] = []
    for number, question in enumerate(questions, 1):
        prompt, place = (Message("user", question.prompt),), f"multiple-choice question {number}"
        endings = [Example(prompt, choice, place=place) for choice in question.choices]
        prompt_ids = tuple(every(encoder.prompt_of, endings[:1])[0])
        rows.append(Question(prompt_ids, tuple(every(encoder.answer_ids, endings))))
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
