"""A metric of your own: a function of a Python file, named as in `my_metric.py:score`."""

import math
import runpy
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np

from d2lora.errors import SettingsError, did_you_mean
from d2lora.evaluation.counts import Column
from d2lora.evaluation.metrics.metric import Metric, Scored, Scores


def own_metric(name: str, folder: Path) -> Metric:
    """Return the metric that a function `(prediction, row) -> float` is.

    Several scores come back as a dictionary, the main one first. The file is run alone: it does
    not import others beside it.

    Args:
        name: As in `my_metric.py:score`.
        folder: What the file's path is relative to.

    Raises:
        SettingsError: If the file cannot be run, or has no such function of two arguments.
    """
    own = _Own.of(name, folder)
    return Metric(name, own.called, (own.called,), own.measure)


@dataclass(frozen=True)
class _Own:
    name: str
    file: Path
    called: str
    function: Callable[[str, dict[str, Any]], Any]

    @classmethod
    def of(cls, name: str, folder: Path) -> "_Own":
        file, called = file_of(name, folder), name.rpartition(":")[2]
        with _refused(f"metric `{name}` cannot be loaded", file):
            found = runpy.run_path(str(file))
        function = found.get(called)
        if not callable(function):
            hint = did_you_mean(called, [key for key, value in found.items() if callable(value)])
            raise SettingsError(f"metric `{name}`: {file} has no function `{called}`.{hint}")
        try:
            signature(function).bind("", {})
        except ValueError:  # a function in C may not say what it takes
            pass
        except TypeError:
            raise SettingsError(
                f"metric `{name}`: expected a function of the prediction and the row, found "
                f"{called}{signature(function)}"
            ) from None
        return cls(name, file, called, function)

    def measure(self, scored: Sequence[Scored]) -> dict[str, Column]:
        rows = [self._scores(number, row) for number, row in enumerate(scored, 1)]
        for number, row in enumerate(rows, 1):
            if row.keys() != rows[0].keys():
                raise SettingsError(
                    f"metric `{self.name}`: expected the same scores of every row, found "
                    f"{', '.join(rows[0])} of test row 1 and {', '.join(row)} of test row {number}"
                )
        return {column: np.array([row[column] for row in rows]) for column in rows[0]}

    def _scores(self, number: int, scored: Scored) -> Scores:
        with _refused(f"metric `{self.name}` failed on test row {number}", self.file):
            found = self.function(scored.output, dict(scored.row))
        several = isinstance(found, Mapping) and found
        scores: dict[Any, Any] = dict(cast("Any", found)) if several else {self.called: found}
        for column, value in scores.items():
            if not isinstance(value, Real | np.bool_) or not _is_finite(value):
                raise SettingsError(
                    f"metric `{self.name}`: expected a finite number for {column} of test row "
                    f"{number}, found {value!r:.60}"
                )
        return {str(column): float(value) for column, value in scores.items()}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def file_of(name: str, folder: Path) -> Path:
    """Return the file of a metric of your own.

    Raises:
        SettingsError: If the name does not hold a file and a function, or there is no such file.
    """
    path, _, called = name.rpartition(":")
    if not path.endswith(".py") or not called.isidentifier():
        raise SettingsError(
            f"metric `{name}`: expected a file and its function, as in `my_metric.py:score`"
        )
    file = folder / path
    if not file.is_file():
        raise SettingsError(f"metric `{name}`: {file}: no such file")
    return file


@contextmanager
def _refused(what: str, file: Path) -> Generator[None]:
    """Refuse a file for what its code raises, with the last line of it that was run."""
    try:
        yield
    except (Exception, SystemExit) as error:  # code of the user's may raise anything
        raise SettingsError(
            f"{what}: {type(error).__name__}: {error}{_line(file, error)}"
        ) from error


def _line(file: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"\n  {error.filename}, line {error.lineno}\n    {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(file)][-1:]
    return "".join(f"\n  {file}, line {f.lineno}, in {f.name}\n    {f.line}" for f in own)
