"""The results of an evaluation, and their tables for the terminal."""

from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
from rich.table import Table

from d2lora.evaluation.stats import Difference, Interval


@dataclass(frozen=True)
class Forgetting:
    """Forgetting of an adapter; changes are adapter minus base."""

    general_loss: float | None
    general_loss_change: float | None
    choice_accuracy: Interval | None
    choice_accuracy_change: Difference | None


@dataclass(frozen=True)
class Evaluation:
    """Records of every adapter, and what follows from them."""

    records: pd.DataFrame
    scores: dict[str, dict[str, Interval]]
    """Adapter -> score -> mean and interval."""
    differences: dict[str, dict[str, Difference]]
    """Adapter -> score -> paired difference to the first adapter named."""
    forgetting: dict[str, Forgetting]
    fast_passes: dict[str, list[str]]
    """Adapter -> names of the fast paths that were used."""
    calibration: dict[str, float] = field(default_factory=dict[str, float])
    """Adapter -> expected calibration error, where answers are closed."""
    trained_on: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Adapter -> set (`task`, `general_text`, `choices`) -> rows of it that it was trained on."""

    def summary(self) -> dict[str, Any]:
        """Return everything but the records as plain values."""
        return {
            "scores": _plain(self.scores),
            "differences_to_first": _plain(self.differences),
            "calibration_error": self.calibration,
            "forgetting": {name: asdict(f) for name, f in self.forgetting.items()},
            "fast_passes": self.fast_passes,
            "trained_on": self.trained_on,
        }


def _plain(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: asdict(v) for key, v in inner.items()} for name, inner in values.items()}


def scores_of_adapters(evaluation: Evaluation) -> Table:
    """Return the scores in percent, with intervals, as a table for the terminal."""
    columns = list(next(iter(evaluation.scores.values())))
    table = Table(title="scores, % (95 % CI)")
    table.add_column("adapter", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    if evaluation.calibration:
        table.add_column("calibration error", justify="right")
    for name, scores in evaluation.scores.items():
        cells = [_percent(scores[column]) for column in columns]
        if name in evaluation.calibration:
            cells.append(f"{100 * evaluation.calibration[name]:.1f}")
        table.add_row(name, *cells)
    for name, by_score in evaluation.differences.items():
        first = next(iter(evaluation.scores))
        table.add_row(f"{name} - {first}", *(_points(by_score[column]) for column in columns))
    return table


def forgetting_table(evaluation: Evaluation) -> Table:
    """Return held-out general loss and multiple-choice accuracy, with their changes."""
    table = Table(title="forgetting, against the base with adapters off")
    table.add_column("adapter", overflow="fold")
    for column in ("held-out general loss", "change", "MC accuracy, %", "change, points"):
        table.add_column(column, justify="right")
    for name, f in evaluation.forgetting.items():
        table.add_row(
            name,
            "-" if f.general_loss is None else f"{f.general_loss:.4f}",
            "-" if f.general_loss_change is None else f"{f.general_loss_change:+.4f}",
            "-" if f.choice_accuracy is None else _percent(f.choice_accuracy),
            "-" if f.choice_accuracy_change is None else _points(f.choice_accuracy_change),
        )
    return table


def _percent(interval: Interval) -> str:
    low, mean, high = (100 * value for value in (interval.low, interval.mean, interval.high))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _points(difference: Difference) -> str:
    low, mean, high = (100 * v for v in (difference.low, difference.mean, difference.high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
