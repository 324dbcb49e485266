"""Scores of outputs against right answers: metrics by the names that task cards give them.

A metric gives each of its scores either as a value per test row, of which it is the mean, or as
counts per row, of whose sums it is a function (`evaluation.counts`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from d2lora.errors import SettingsError, did_you_mean
from d2lora.evaluation.counts import Column
from d2lora.evaluation.metrics.answers import accuracy, exact_match, gsm8k, token_f1
from d2lora.evaluation.metrics.labels import macro_f1, micro_f1
from d2lora.evaluation.metrics.metric import (
    Metric,
    Scored,
    of_best_reference,
    of_each_row,
)
from d2lora.evaluation.metrics.own import own_metric
from d2lora.evaluation.metrics.preference import PREFERENCE, preference
from d2lora.evaluation.metrics.rouge import rouge, rouge_lsum
from d2lora.evaluation.metrics.structured import json_match, json_valid, slot_f1
from d2lora.evaluation.metrics.translation import bleu, chrf
from d2lora.runtime.extras import need_extra

__all__ = [
    "METRICS", "Metric", "Scored", "main_column", "measure_all", "metric_named", "metrics_named",
    "preference", "title_of",
]  # fmt: skip

METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", ("accuracy",), of_best_reference(accuracy)),
        Metric("exact_match", "exact match", ("exact_match",), of_best_reference(exact_match)),
        Metric("token_f1", "token F1", ("token_f1",), of_best_reference(token_f1)),
        Metric("macro_f1", "macro F1", ("macro_f1",), macro_f1),
        Metric("micro_f1", "micro F1", ("micro_f1",), micro_f1),
        Metric("rouge", "ROUGE-L", ("rougeL", "rouge1", "rouge2"), of_each_row(rouge)),
        Metric("rougeLsum", "ROUGE-Lsum", ("rougeLsum",), of_each_row(rouge_lsum)),
        Metric("bleu", "BLEU", ("bleu",), bleu, extra="metrics"),
        Metric("chrf", "chrF", ("chrf",), chrf, extra="metrics"),
        Metric(
            "gsm8k", "exact match", ("exact_match", "exact_match_flexible"),
            of_best_reference(gsm8k),
        ),
        Metric("json_valid", "valid JSON", ("json_valid",), of_each_row(json_valid)),
        Metric("json_match", "JSON match", ("json_match",), json_match),
        Metric("slot_f1", "slot F1", ("slot_f1",), slot_f1),
    )
}  # fmt: skip
"""The metrics that come with d2lora."""
_TITLES = {
    **{metric.columns[0]: metric.title for metric in METRICS.values()},
    PREFERENCE[0]: "preference accuracy",
}
_FIELDS = frozenset(
    "adapter row prompt target references choices output n_output_tokens confidence".split()
)
"""What a record of a test row has beside its scores."""


def metric_named(name: str, folder: Path = Path()) -> Metric:
    """Return a metric by its name, or as in `my_metric.py:score` by a file and its function.

    Args:
        name: A name of `METRICS`, or a file and a function of it.
        folder: What the file's path is relative to.

    Raises:
        SettingsError: If there is none, or what it needs is not installed.
    """
    if ".py" in name:
        return own_metric(name, folder)
    if name not in METRICS:
        raise SettingsError(
            f"unknown metric `{name}`.{did_you_mean(name, METRICS)} Known: {', '.join(METRICS)}, "
            "and functions of your own as in `my_metric.py:score`"
        )
    metric = METRICS[name]
    if metric.extra is not None:
        need_extra(metric.extra, f"metric `{name}`")
    return metric


def metrics_named(names: Sequence[str], folder: Path = Path()) -> tuple[Metric, ...]:
    """Return metrics by their names, the main one first.

    Raises:
        SettingsError: If one cannot be used, or two give a score of the same name.
    """
    metrics = tuple(metric_named(name, folder) for name in names)
    _check_different((metric.name, column) for metric in metrics for column in metric.columns)
    return metrics


def measure_all(metrics: Sequence[Metric], scored: Sequence[Scored]) -> dict[str, Column]:
    """Return every score of test rows, at least one, the main one first.

    Raises:
        SettingsError: If a metric of your own fails, or two give a score of the same name.
        DataError: If right answers are not what a metric compares with.
    """
    by_metric = {metric.name: metric.measure(scored) for metric in metrics}
    _check_different((name, column) for name, found in by_metric.items() for column in found)
    return {name: column for found in by_metric.values() for name, column in found.items()}


def main_column(columns: Iterable[str]) -> str:
    """Return the name of the main one of a task's scores, its first; empty where there is none."""
    return next(iter(columns), "")


def title_of(column: str) -> str:
    """Return the name of a score in reports."""
    return _TITLES.get(column, column)


def _check_different(columns: Iterable[tuple[str, str]]) -> None:
    metric_of: dict[str, str] = {}
    for metric, column in columns:
        if column in _FIELDS:
            raise SettingsError(f"metric `{metric}`: a score cannot be named `{column}`")
        if column in metric_of:
            raise SettingsError(
                f"metrics `{metric_of[column]}` and `{metric}` both give `{column}`; "
                "leave one out, or rename it"
            )
        metric_of[column] = metric
