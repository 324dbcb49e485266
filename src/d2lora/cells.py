"""One cell of a comparison: an arm on a task at one n with one seed; adapt, then evaluate.

Cells run in worker processes of one thread each, which keep the base loaded between cells.
"""

import json
import os
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from d2lora.console import quiet_libraries
from d2lora.settings import AdaptSettings, BaseSettings, EvaluateSettings


@dataclass(frozen=True)
class Cell:
    """What is run: training settings and test data."""

    arm: str
    task: str
    training: AdaptSettings
    test_data: Path
    n_test: int
    max_new_tokens: int
    general_text: Path | None = None
    choices: Path | None = None

    @property
    def n(self) -> int:
        """Task examples, validation rows included."""
        assert self.training.n is not None
        return self.training.n

    @property
    def seed(self) -> int:
        """Root seed of the cell."""
        return self.training.seed


@dataclass(frozen=True)
class CellResult:
    """What was measured of a cell."""

    arm: str
    task: str
    n: int
    seed: int
    learning_rate: float
    scores: dict[str, list[float]]
    """Score -> one value per test row, in order, from 0 to 1."""
    general_loss_change: float | None
    choice_accuracy_change: float | None
    training_s: float
    n_tokens: int
    adapter: str


def run_cell(cell: Cell) -> CellResult:
    """Adapt and evaluate. Heavy imports happen here, in the worker."""
    from d2lora.adaptation import adapt
    from d2lora.evaluation import evaluate
    from d2lora.metrics import SCORERS
    from d2lora.tasks import TASKS

    base = _shared_base(cell.training.base)
    adapter = adapt(cell.training, base)
    evaluation = evaluate(
        EvaluateSettings(
            base=cell.training.base,
            threads=cell.training.threads,
            adapters=(str(adapter.path),),
            data=(str(cell.test_data),),
            limit=cell.n_test,
            general_text=_named(cell.general_text),
            choices=_named(cell.choices),
            max_new_tokens=cell.max_new_tokens,
            batch_size=100,
            out=adapter.path / "evaluation",
            quiet=True,
        ),
        base,
    )
    records = evaluation.records
    own = records[records["adapter"] == str(adapter.path)]
    columns = SCORERS[TASKS[cell.task].score]("", "0")
    forgetting = evaluation.forgetting[str(adapter.path)]
    accuracy = forgetting.choice_accuracy_change
    cost = adapter.manifest.cost
    return CellResult(
        arm=cell.arm,
        task=cell.task,
        n=cell.n,
        seed=cell.seed,
        learning_rate=cell.training.learning_rate,
        scores={column: own[column].tolist() for column in columns},
        general_loss_change=forgetting.general_loss_change,
        choice_accuracy_change=None if accuracy is None else accuracy.mean,
        training_s=cost["elapsed_s"],
        n_tokens=cost["n_tokens"],
        adapter=str(adapter.path),
    )


@cache
def _shared_base(name: str) -> Any:
    from d2lora.models import load_base

    return load_base(BaseSettings(base=name, threads=1))


def _named(path: Path | None) -> tuple[str, ...]:
    return () if path is None else (str(path),)


def n_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(number: int) -> Generator[ProcessPoolExecutor]:
    """Yield a pool of fresh processes of one thread each."""
    # Set before torch is loaded in the workers: two OpenMP teams on the same cores slow each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("spawn")
    with ProcessPoolExecutor(number, context, initializer=quiet_libraries) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_results(results: list[CellResult], path: Path) -> None:
    """Write results as JSONL."""
    from dataclasses import asdict

    from d2lora.runs import write_text

    write_text(path, "".join(json.dumps(asdict(result)) + "\n" for result in results))
