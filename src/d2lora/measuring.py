"""base + one adapter + test rows -> a record of every row, general loss, choices answered right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from d2lora.batches import Question
from d2lora.console import Reporter
from d2lora.continuations import continuation_scores
from d2lora.decoding import Decoder
from d2lora.encode import Encoder
from d2lora.encoded_sets import encode_all, encode_pairs, encode_prompts, every
from d2lora.errors import DataError
from d2lora.generation import adapted, chat_format_of, decode
from d2lora.metrics import MAIN_SCORE, SCORERS, preference
from d2lora.models import Base
from d2lora.pair_scores import pair_log_probabilities
from d2lora.rows import Example, Message
from d2lora.scorer import TokenScorer, mean_loss
from d2lora.settings import EvaluateSettings
from d2lora.tasks import Choice, Say, TaskData, read_choices, read_task

BASE = "base"


@dataclass(frozen=True)
class TestSets:
    """What adapters are measured on; each may be empty."""

    __test__ = False  # not a class of tests

    task: TaskData | None
    general: list[Example]
    choices: list[Choice]
    whole_prompts: bool = False
    """Generate from prompts as they are, whatever the length limit."""

    @classmethod
    def read(cls, settings: EvaluateSettings, say: Say | None = None) -> "TestSets":
        """Read the test rows that the settings name; `say` is told what they were read as.

        Raises:
            DataError: If rows are bad, or the task has no scored output.
        """
        task = read_task(settings.data, settings.task, say=say) if settings.data else None
        if task is not None and task.task.score not in MAIN_SCORE:
            raise DataError(
                f"task {task.task.name} has no scored output; give it as --general-text"
            )
        texts = settings.general_text
        general = list(read_task(texts, say=say).examples) if texts else []
        return cls(task, general, read_choices(settings.choices, say) if settings.choices else [])


@dataclass(frozen=True)
class Measured:
    """What is measured of one adapter."""

    records: list[dict[str, Any]]
    general_loss: float | None
    right: np.ndarray[tuple[int], np.dtype[np.float64]] | None
    """1 for each multiple-choice question answered right, else 0."""


def measure(
    name: str, base: Base, sets: TestSets, settings: EvaluateSettings, reporter: Reporter
) -> Measured:
    """Measure one adapter (a folder), or the base alone (`base`), on every set."""
    path = None if name == BASE else Path(name)
    with adapted(base, path) as model:
        encoder = Encoder.of(base, chat_format_of(path, settings.chat_format))
        return Measured(
            _score_task(model, base, encoder, name, sets, settings, reporter),
            _general_loss(model, base, encoder, sets.general, settings, reporter),
            _right_choices(model, base, encoder, sets.choices),
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
    decoder = Decoder(model, base, settings.max_new_tokens, settings.batch_size, lean=settings.lean)
    overlong = "error" if sets.whole_prompts else settings.overlong
    prompts = encode_prompts(encoder, examples, settings.max_length, overlong)
    _say(prompts.report(settings.max_length), reporter)
    records: dict[int, dict[str, Any]] = {}
    with reporter.bar("generating", len(examples)) as bar:
        for index, ids in decoder.complete(prompts.ids):
            records[index] = _record(
                name, index, examples[index], decode(base, ids), len(ids), scorer
            )
            bar.update(len(records))
    return [records[index] for index in range(len(examples))]


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
    model: nn.Module, base: Base, encoder: Encoder, questions: Sequence[Choice]
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
        right.append(float(int(np.argmax(per_character)) == question.answer))
    return np.array(right)


def questions_of(encoder: Encoder, questions: Sequence[Choice]) -> list[Question]:
    """Return multiple-choice questions as token ids; a choice's EOS is not scored."""
    rows: list[Question] = []
    for number, question in enumerate(questions, 1):
        prompt, place = (Message("user", question.prompt),), f"multiple-choice question {number}"
        endings = [Example(prompt, choice, place=place) for choice in question.choices]
        whole = every(encoder.encode, endings)
        endings = tuple(w.ids[w.n_prompt : -1] for w in whole)
        rows.append(Question(whole[0].ids[: whole[0].n_prompt], endings))
    return rows


def _say(told: str | None, reporter: Reporter) -> None:
    if told is not None:
        reporter.say(told)
