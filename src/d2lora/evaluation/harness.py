"""Tasks of lm-evaluation-harness, scored by its own model class over a base and its adapter.

What is computed is what `lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER` computes:
its prompts (without a chat template), tokens, metrics and seeds, without our fast paths.
"""

import copy
import io
import logging
import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import nn

from d2lora.adapters.base import Base
from d2lora.errors import DataError, SettingsError, did_you_mean, first_line
from d2lora.evaluation.counts import Column
from d2lora.runtime.extras import need_extra
from d2lora.settings.tools import HARNESS as PREFIX

_FAULTS = (AttributeError, LookupError, TemplateError, TypeError, ValueError)
"""What the harness raises for task files that do not fit their rows."""
_BATCH_SIZE = 8
"""The harness holds the log-probabilities of a batch over the whole vocabulary."""


@dataclass(frozen=True)
class HarnessScores:
    """What the harness measures of one model on a task."""

    records: list[dict[str, Any]]
    """One per row: prompt, target and output."""
    columns: dict[str, Column]
    """The scores that are means of rows, each with a value per row, in the order of the task."""


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness with its rows."""

    name: str
    task: Any
    """Its own `Task`."""

    @property
    def is_multiple_choice(self) -> bool:
        """Whether choices are scored by their log-probability."""
        return self.task.OUTPUT_TYPE == "multiple_choice"

    @property
    def means(self) -> list[str]:
        """Its metrics whose value is the mean of its rows' values."""
        from lm_eval.api.metrics import mean

        return [name for name, one in self.task.aggregation().items() if one is mean]

    def check_choices(self) -> None:
        """Check that forgetting can be measured on it.

        Raises:
            DataError: If it is no task of multiple choice, or does not say which choice is right.
        """
        if not self.is_multiple_choice:
            raise DataError(
                f"--choices {PREFIX}{self.name}: not a task of multiple choice; give it as --data"
            )
        if not {"acc", "acc_norm"} & set(self.means):
            raise DataError(
                f"--choices {PREFIX}{self.name}: it has neither `acc_norm` nor `acc`; give it as "
                "--data"
            )

    def unscored(self, metrics: Iterable[str]) -> DataError:
        """Return the error that none of its metrics can be compared."""
        return DataError(
            f"{PREFIX}{self.name}: none of its metrics ({', '.join(metrics)}) is a mean of rows, "
            "so adapters cannot be compared on it"
        )

    def scores(
        self, model: nn.Module, base: Base, limit: int | None = None, *, quiet: bool = False
    ) -> HarnessScores:
        """Score a model on the first rows of the task.

        Args:
            model: The base, or it with an adapter on it, and no fast paths.
            base: The base that the model is.
            limit: How many rows. None: all.
            quiet: Whether to show no progress.

        Raises:
            DataError: If no metric of the task is a mean of rows.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        if self.task.get_config("num_fewshot") is None:
            self.task.set_config(key="num_fewshot", value=0)
        self.task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        tokenizer = copy.deepcopy(base.tokenizer)  # the harness sets a pad token
        model_class: Any = HFLM  # a decorator hides what it takes
        with _as_the_harness_runs(quiet=quiet):
            language_model = model_class(model, tokenizer=tokenizer, batch_size=_BATCH_SIZE)
            try:
                found: Any = evaluate(
                    lm=language_model,
                    task_dict={"tasks": {self.name: self.task}},
                    limit=limit,
                    bootstrap_iters=0,
                )
            except _FAULTS as error:
                raise DataError(
                    f"{PREFIX}{self.name}: it cannot be scored: {_reason(error)}"
                ) from error
        samples = found["samples"][self.name]
        columns = _means(samples, self.task.aggregation())
        if not columns:
            raise self.unscored(samples[0]["metrics"])
        rows = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        return HarnessScores([self._record(sample) for sample in rows], columns)

    def right(self, model: nn.Module, base: Base, *, quiet: bool = False) -> list[float]:
        """Return 1 for each question answered right, else 0: `acc_norm`, else `acc`."""
        columns = self.scores(model, base, quiet=quiet).columns
        return np.asarray(columns["acc_norm" if "acc_norm" in columns else "acc"]).tolist()

    def _record(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        target, output = sample["target"], str(sample["resps"][0][0])
        record = {"row": sample["doc_id"], "prompt": str(sample["arguments"][0][0])}
        if not self.is_multiple_choice:
            return {**record, "target": str(target), "output": output}
        choices = self.task.doc_to_choice(sample["doc"])
        known = (*choices, *range(len(choices)))
        if isinstance(target, str | int) and target not in known and not self.task.multiple_input:
            raise DataError(
                f"{PREFIX}{self.name}: the target of row {sample['doc_id'] + 1} is {target!r:.60}, "
                f"which is none of its {len(choices)} choices"
            )
        sums = [float(of_choice[0][0]) for of_choice in sample["resps"][: len(choices)]]
        return {
            **record,
            "target": str(choices[target] if isinstance(target, int) else target),
            "output": str(choices[int(np.argmax(sums))]),
            "log_probabilities": sums,
        }


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files among names, and the names of tasks of the harness without the prefix."""
    files = [name for name in names if not name.startswith(PREFIX)]
    return files, [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]


def read_harness_tasks(
    names: Sequence[str], folder: Path | None, *, quiet: bool = False
) -> dict[str, HarnessTask]:
    """Read tasks with their rows.

    Args:
        names: Their names, without the prefix.
        folder: Folder of task files of the user's own, which come first. None: the harness's alone.
        quiet: Whether to show no progress.

    Raises:
        SettingsError: If the harness is not installed, or the folder is not there or not used.
        DataError: If a name is unknown or that of a group, or rows cannot be read.
    """
    if folder is not None and not folder.is_dir():
        raise SettingsError(f"--lm-eval-tasks {folder}: no such folder")
    if not names and folder is not None:
        raise SettingsError(
            f"--lm-eval-tasks {folder}: no task of it is named; give {PREFIX}NAME as --data or "
            "--choices"
        )
    if not names:
        return {}
    need_extra("lm-eval", f"{PREFIX}{names[0]}")
    from lm_eval.tasks import TaskManager

    with _as_the_harness_runs(quiet=quiet):
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            # The harness's own are thousands of files, read only where they are needed.
            manager = TaskManager(include_path=folder)
        return {name: _read(name, manager) for name in names}


def _read(name: str, manager: Any) -> HarnessTask:
    from datasets.exceptions import DatasetsError

    if name in {*manager.all_groups, *manager.all_tags}:
        raise DataError(f"{PREFIX}{name}: a group of tasks; give each of its tasks by its name")
    if name not in manager.all_subtasks:
        hint = did_you_mean(name, manager.all_subtasks)
        raise DataError(
            f"{PREFIX}{name}: lm-evaluation-harness has no such task.{hint} A folder of your own "
            "tasks is given as --lm-eval-tasks"
        )
    try:
        task = manager.load([name])["tasks"][name]
    except (*_FAULTS, DatasetsError, ImportError, OSError, RuntimeError) as error:
        raise DataError(f"{PREFIX}{name}: it cannot be loaded: {_reason(error)}") from error
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"{PREFIX}{name}: it runs code that a model writes; d2lora does not")
    read = HarnessTask(name, task)
    if not read.means:
        raise read.unscored(task.aggregation())
    return read


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _means(
    samples: Sequence[Mapping[str, Any]], aggregation: Mapping[str, Any]
) -> dict[str, Column]:
    """Return the metrics whose value is the mean of its rows' values."""
    from lm_eval.api.metrics import mean

    filters = dict.fromkeys(str(sample["filter"]) for sample in samples)
    columns: dict[str, Column] = {}
    for name in filters:
        rows = [sample for sample in samples if sample["filter"] == name]
        for metric in rows[0]["metrics"]:
            values = [row[metric] for row in rows]
            if aggregation.get(metric) is mean and all(isinstance(v, Real) for v in values):
                named = metric if len(filters) == 1 else f"{metric},{name}"
                columns[named] = np.array(values, dtype=np.float64)
    return columns


@contextmanager
def _as_the_harness_runs(*, quiet: bool) -> Generator[None]:
    """Set its seeds inside the block, and keep its log to errors."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    logger = logging.getLogger("lm_eval")
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()  # noqa: NPY002
    bars = redirect_stderr(io.StringIO()) if quiet else nullcontext()
    with torch.random.fork_rng(), bars:
        logger.setLevel(logging.ERROR)
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            logger.setLevel(level)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
