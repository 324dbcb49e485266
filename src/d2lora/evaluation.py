"""base + adapters + task -> per-example records, scores with intervals, forgetting.

records.parquet, records.jsonl   one row per adapter and test row
summary.json                     scores, paired differences, forgetting
done.json                        the marker of completion
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from d2lora.batches import Question
from d2lora.console import Reporter, table_console
from d2lora.continuations import continuation_scores
from d2lora.decoding import Decoder
from d2lora.encode import Encoder, encode_all, encode_pairs
from d2lora.errors import DataError, SettingsError
from d2lora.generation import adapted, chat_format_of, decode
from d2lora.metrics import MAIN_SCORE, SCORERS, columns_of, preference
from d2lora.models import Base, load_base
from d2lora.pair_scores import pair_log_probabilities
from d2lora.rows import Example, Message
from d2lora.runs import SETTINGS, RunFolder, new_folder, provenance, write_json, write_text
from d2lora.scorer import TokenScorer, mean_loss
from d2lora.scores import Evaluation, Forgetting, forgetting_table, score_table
from d2lora.settings import EvaluateSettings
from d2lora.stats import Difference, Interval, mean_interval, paired_difference
from d2lora.tasks import Choice, TaskData, read_choices, read_task

BASE = "base"


@dataclass(frozen=True)
class TestSets:
    """What adapters are measured on; each may be empty."""

    __test__ = False  # not a class of tests

    task: TaskData | None
    general: list[Example]
    choices: list[Choice]

    @classmethod
    def read(cls, settings: EvaluateSettings) -> "TestSets":
        """Read the test rows that the settings name.

        Raises:
            DataError: If rows are bad, or the task has no scored output.
        """
        task = read_task(settings.data, settings.task) if settings.data else None
        if task is not None and task.task.score not in MAIN_SCORE:
            raise DataError(
                f"task {task.task.name} has no scored output; give it as --general-text"
            )
        general = list(read_task(settings.general_text).examples) if settings.general_text else []
        return cls(task, general, read_choices(settings.choices) if settings.choices else [])


@dataclass(frozen=True)
class Measured:
    """What is measured of one adapter."""

    records: list[dict[str, Any]]
    general_loss: float | None
    right: np.ndarray[tuple[int], np.dtype[np.float64]] | None
    """1 for each multiple-choice question answered right, else 0."""


def evaluate(settings: EvaluateSettings, base: Base | None = None) -> Evaluation:
    """Score adapters on a task and measure what they forgot.

    Forgetting is measured against the base with adapters off: the change of loss on held-out
    general text and of multiple-choice accuracy (length-normalised log-probabilities).

    Args:
        settings: What to score and on what.
        base: The base already loaded as the settings say, when many evaluations share it.

    Raises:
        D2LoraError: One of its kinds, for settings, data, a base or an adapter that cannot be
            used.
    """
    reporter = Reporter(quiet=settings.quiet)
    names = _names(settings)
    RunFolder.open(settings.out, "")
    sets = TestSets.read(settings)
    base = base or load_base(settings)
    measured: dict[str, Measured] = {}
    for name in names:
        scored = name in settings.adapters or not settings.adapters
        reporter.say(f"evaluating {name}")
        own = sets if scored else replace(sets, task=None)
        measured[name] = measure(name, base, own, settings, reporter)
    evaluation = _evaluated(measured, sets.task, list(settings.adapters) or [BASE])
    _write(evaluation, settings)
    return evaluation


def measure(
    name: str, base: Base, sets: TestSets, settings: EvaluateSettings, reporter: Reporter
) -> Measured:
    """Measure one adapter (a folder), or the base alone (`base`), on every set."""
    path = None if name == BASE else Path(name)
    with adapted(base, path) as model:
        encoder = Encoder.of(base, chat_format_of(path, settings.chat_format))
        return Measured(
            _score_task(model, base, encoder, name, sets.task, settings, reporter),
            _general_loss(model, base, encoder, sets.general, settings),
            _right_choices(model, base, encoder, sets.choices),
        )


def _names(settings: EvaluateSettings) -> list[str]:
    """Return what to measure; the base comes first where forgetting needs it."""
    if not (settings.data or settings.general_text or settings.choices):
        raise SettingsError("nothing to evaluate on: give --data, --general-text or --choices")
    names = list(dict.fromkeys(settings.adapters)) or [BASE]
    forgetting = settings.general_text or settings.choices
    return [BASE, *names] if forgetting and BASE not in names else names


def _score_task(
    model: nn.Module,
    base: Base,
    encoder: Encoder,
    name: str,
    data: TaskData | None,
    settings: EvaluateSettings,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    if data is None:
        return []
    examples = data.examples[: settings.limit]
    if data.task.score == "preference":
        return _score_preferences(model, base, encoder, name, examples, settings)
    scorer = SCORERS[data.task.score]
    decoder = Decoder(model, base, settings.max_new_tokens, settings.batch_size, lean=settings.lean)
    prompts = [encoder.prompt_ids(example.prompt) for example in examples]
    records: dict[int, dict[str, Any]] = {}
    with reporter.bar("generating", len(prompts)) as bar:
        for index, ids in decoder.complete(prompts):
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
) -> list[dict[str, Any]]:
    """Record how likely both completions of each pair are; over-long rows follow the settings."""
    encoded = encode_pairs(encoder, examples, settings.max_length, settings.overlong)
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
) -> float | None:
    if not examples:
        return None
    encoded = encode_all(encoder, examples, settings.max_length, settings.overlong)
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
    for question in questions:
        prompt = (Message("user", question.prompt),)
        whole = [encoder.encode(Example(prompt, choice)) for choice in question.choices]
        endings = tuple(w.ids[w.n_prompt : -1] for w in whole)
        rows.append(Question(whole[0].ids[: whole[0].n_prompt], endings))
    return rows


def _evaluated(
    measured: dict[str, Measured], task: TaskData | None, named: Sequence[str]
) -> Evaluation:
    records = pd.DataFrame([record for raw in measured.values() for record in raw.records])
    scores: dict[str, dict[str, Interval]] = {}
    differences: dict[str, dict[str, Difference]] = {}
    if task is not None:
        columns = columns_of(task.task.score)
        table = {
            name: {c: np.array([record[c] for record in measured[name].records]) for c in columns}
            for name in named
        }
        for name in table:
            scores[name] = {c: mean_interval(table[name][c]) for c in columns}
        first = table[named[0]]
        for name in list(table)[1:]:
            differences[name] = {
                c: paired_difference(first[c][None], table[name][c][None]) for c in columns
            }
    reference = measured.get(BASE)
    forgetting = {name: _forgetting(raw, reference) for name, raw in measured.items()}
    return Evaluation(records, scores, differences, forgetting)


def _forgetting(raw: Measured, base: Measured | None) -> Forgetting:
    loss_change = accuracy_change = None
    if base is not None and base is not raw:
        if raw.general_loss is not None and base.general_loss is not None:
            loss_change = raw.general_loss - base.general_loss
        if raw.right is not None and base.right is not None:
            accuracy_change = paired_difference(base.right[None], raw.right[None])
    accuracy = None if raw.right is None else mean_interval(raw.right)
    return Forgetting(raw.general_loss, loss_change, accuracy, accuracy_change)


def _write(evaluation: Evaluation, settings: EvaluateSettings) -> None:
    with new_folder(settings.out) as folder:
        if len(evaluation.records):
            evaluation.records.to_parquet(folder / "records.parquet", index=False)
            rows = evaluation.records.to_dict(orient="records")
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / "records.jsonl", lines)
        write_text(folder / SETTINGS, settings.to_yaml())
        write_json(folder / "provenance.json", provenance())
        write_json(folder / "summary.json", evaluation.summary())
        RunFolder(folder).finish({"kind": "evaluation"})


def command(settings: EvaluateSettings) -> None:
    """Run `d2lora evaluate`."""
    evaluation = evaluate(settings)
    console = table_console()
    if evaluation.scores:
        console.print(score_table(evaluation))
    if settings.general_text or settings.choices:
        console.print(forgetting_table(evaluation))
    Reporter(quiet=settings.quiet).say(f"records and summary written to {settings.out}")
