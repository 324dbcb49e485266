"""base + adapters + task -> per-example records, scores with intervals, forgetting.

records.parquet, records.jsonl   one row per adapter and test row
bad_rows.jsonl                   bad rows that were skipped
summary.json                     scores, paired differences, forgetting, fast paths used
done.json                        the marker of completion
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from d2lora.adapters.attach import attached
from d2lora.adapters.base import Base, load_base
from d2lora.adapters.files import AdapterFiles
from d2lora.adapters.manifest import check_fit
from d2lora.data.encoded_sets import answers_beyond
from d2lora.data.reading import TaskData
from d2lora.data.rows import Fault
from d2lora.data.sources import BAD_ROWS, write_bad_rows
from d2lora.data.trained_rows import TrainedRows, places
from d2lora.errors import SettingsError, counted
from d2lora.evaluation.closed import calibration_error
from d2lora.evaluation.measure import BASE, Measured, check_rows, encoders_of, measure
from d2lora.evaluation.scores import Evaluation, Forgetting, forgetting_table, scores_of_adapters
from d2lora.evaluation.stats import (
    Difference,
    Interval,
    difference_of,
    interval_of,
    mean_interval,
    paired_difference,
)
from d2lora.evaluation.test_sets import TestSets, labels_known
from d2lora.runtime.console import Reporter, table_console
from d2lora.runtime.devices import slow_dtype
from d2lora.runtime.run_folder import (
    SETTINGS,
    RunFolder,
    new_folder,
    provenance,
    write_json,
    write_text,
)
from d2lora.settings import EvaluateSettings


def evaluate(settings: EvaluateSettings, base: Base | None = None) -> Evaluation:
    """Score adapters on a task and measure what they forgot.

    Forgetting is measured against the base with adapters off, in the adapter's chat format: the
    change of loss on held-out general text and of multiple-choice accuracy (length-normalised
    log-probabilities).

    Args:
        settings: What to score and on what.
        base: The base already loaded as the settings say, when many evaluations share it.

    Raises:
        D2LoraError: One of its kinds, for settings, data, a base or an adapter that cannot be
            used.
    """
    names = _names(settings)
    with RunFolder.open(settings.out, "", whole=True):
        return _evaluate(settings, base, names)


def _evaluate(settings: EvaluateSettings, base: Base | None, names: Sequence[str]) -> Evaluation:
    reporter = Reporter(quiet=settings.quiet)
    sets = TestSets.read(settings, reporter.say)
    if sets.faults:
        reporter.say(f"skipped {counted(len(sets.faults), 'bad row')}: {settings.out / BAD_ROWS}")
    for name in names:
        if name != BASE:  # all of them before the first is measured
            AdapterFiles.read(Path(name))
    base = base or load_base(settings)
    if slow := slow_dtype(base.model.dtype, base.model.device):
        reporter.say(f"warning: {slow}")
    folders = [Path(name) for name in names if name != BASE]
    for folder in folders:
        if warning := check_fit(folder, base):
            reporter.say(warning)
        with attached(base.model, folder):  # what does not fit is known before hours of measuring
            pass
    sets = replace(sets, labels=labels_known(sets, folders, reporter.say))
    check_rows(names, base, sets, settings)
    trained_on = _trained_on(names, base, sets, reporter)
    _check_lengths(sets.task, base, settings, reporter)
    measured: dict[str, Measured] = {}
    for name in names:
        scored = name in settings.adapters or not settings.adapters
        reporter.say(f"evaluating {name}")
        own = sets if scored else sets.without_task()
        measured[name] = measure(name, base, own, settings, reporter)
    references = _references(measured, base, sets, settings, reporter)
    evaluation = _evaluated(measured, references, list(settings.adapters) or [BASE])
    evaluation = replace(evaluation, trained_on=trained_on)
    _write(evaluation, sets.faults, settings)
    return evaluation


def _references(
    measured: Mapping[str, Measured],
    base: Base,
    sets: TestSets,
    settings: EvaluateSettings,
    reporter: Reporter,
) -> dict[str, Measured]:
    """Measure what the base has to forget in each chat format that an adapter is prompted in."""
    if BASE not in measured or not sets.of_forgetting:
        return {}
    found = {BASE: measured[BASE]}
    for name, raw in measured.items():
        if all(raw.way != other.way for other in found.values()):
            reporter.say(f"evaluating base in the chat format of {name}")
            found[f"{BASE}, prompted as {name}"] = measure(
                BASE, base, sets.without_task(), settings, reporter, prompted_as=name
            )
    return found


def _check_lengths(
    task: TaskData | None, base: Base, settings: EvaluateSettings, reporter: Reporter
) -> None:
    """Warn of gold answers that are too long to be generated."""
    if task is None or task.task.answers != "open":
        return
    examples = task.examples[: settings.limit]
    for encoder in encoders_of(settings.adapters or (BASE,), base, settings):
        beyond = answers_beyond(encoder, examples, settings.max_new_tokens)
        if beyond is not None:
            reporter.say(f"warning: {beyond}")
            return


def _names(settings: EvaluateSettings) -> list[str]:
    """Return what to measure; the base comes first where forgetting needs it."""
    if not (settings.data or settings.general_text or settings.choices):
        raise SettingsError("nothing to evaluate on: give --data, --general-text or --choices")
    names = list(dict.fromkeys(settings.adapters)) or [BASE]
    forgetting = settings.general_text or settings.choices
    return [BASE, *names] if forgetting and BASE not in names else names


def _trained_on(
    names: Sequence[str], base: Base, sets: TestSets, reporter: Reporter
) -> dict[str, dict[str, int]]:
    """Count the rows of each set that each adapter, or what it comes from, was trained on."""
    of_base = TrainedRows.read(base.folder)
    counts: dict[str, dict[str, int]] = {}
    for name in names:
        trained = of_base if name == BASE else of_base | TrainedRows.read(Path(name))
        found = trained.among(sets.rows)
        uses = dict.fromkeys(row.use for row in sets.rows)
        counts[name] = {use: sum(row.use == use for row in found) for use in uses}
        for place in places(found):
            reporter.say(
                f"warning: {name} was trained on {place}: scores on these rows say nothing about "
                "new text; leave them out"
            )
    return counts


def _evaluated(
    measured: dict[str, Measured],
    references: dict[str, Measured],
    named: Sequence[str],
) -> Evaluation:
    records = pd.DataFrame([record for raw in measured.values() for record in raw.task.records])
    scores: dict[str, dict[str, Interval]] = {}
    differences: dict[str, dict[str, Difference]] = {}
    if measured[named[0]].task.columns:
        scored = {name: measured[name].task for name in named}
        scores = {
            name: {column: interval_of(values) for column, values in own.columns.items()}
            for name, own in scored.items()
        }
        first = scored[named[0]].columns
        for name in named[1:]:
            columns = scored[name].columns
            differences[name] = {c: difference_of(first[c], columns[c]) for c in columns}
    calibration = {
        name: error
        for name, raw in measured.items()
        if (error := _calibration(raw.task.records)) is not None
    }
    by_way = {raw.way: raw for raw in references.values()}
    forgetting = {
        name: _forgetting(raw, by_way.get(raw.way))
        for name, raw in {**measured, **references}.items()
    }
    passes = {name: raw.fast_passes for name, raw in measured.items()}
    return Evaluation(records, scores, differences, forgetting, passes, calibration=calibration)


def _calibration(records: Sequence[dict[str, Any]]) -> float | None:
    """Return the calibration error of closed answers; None of others."""
    if not records or "confidence" not in records[0]:
        return None
    confidence = np.array([record["confidence"] for record in records])
    right = np.array(
        [float(r["output"] in (r["target"], *r.get("references", ()))) for r in records]
    )
    return calibration_error(confidence, right)


def _forgetting(raw: Measured, base: Measured | None) -> Forgetting:
    loss_change = accuracy_change = None
    if base is not None and base is not raw:
        if raw.general_loss is not None and base.general_loss is not None:
            loss_change = raw.general_loss - base.general_loss
        if raw.right is not None and base.right is not None:
            accuracy_change = paired_difference(base.right[None], raw.right[None])
    accuracy = None if raw.right is None else mean_interval(raw.right)
    return Forgetting(raw.general_loss, loss_change, accuracy, accuracy_change)


def _write(evaluation: Evaluation, faults: Sequence[Fault], settings: EvaluateSettings) -> None:
    with new_folder(settings.out.resolve()) as folder:  # behind a symbolic link, which stays
        if len(evaluation.records):
            evaluation.records.to_parquet(folder / "records.parquet", index=False)
            rows = evaluation.records.to_dict(orient="records")
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / "records.jsonl", lines)
        write_bad_rows(faults, folder)
        write_text(folder / SETTINGS, settings.to_yaml())
        write_json(folder / "provenance.json", provenance())
        write_json(folder / "summary.json", evaluation.summary())
        RunFolder(folder).finish({"kind": "evaluation"})


def command(settings: EvaluateSettings) -> None:
    """Run `d2lora evaluate`."""
    evaluation = evaluate(settings)
    console = table_console()
    if evaluation.scores:
        console.print(scores_of_adapters(evaluation))
    if settings.general_text or settings.choices:
        console.print(forgetting_table(evaluation))
    Reporter(quiet=settings.quiet).say(f"records and summary written to {settings.out}")
