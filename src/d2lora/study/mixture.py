"""General and task rows in one file, for the control that trains on both in one run."""

import json
from pathlib import Path
from typing import Any

from d2lora.data.reading import TaskData, read_task
from d2lora.data.rows import Example
from d2lora.data.sources import nested_order, split_validation
from d2lora.errors import SettingsError
from d2lora.runtime.run_folder import write_text
from d2lora.settings import AdaptSettings, WarmupSettings
from d2lora.settings.seeds import seed_of
from d2lora.training.schedule import passes


def write_mixture(
    general: WarmupSettings, training: AdaptSettings, out: Path, held_out: Path
) -> dict[str, Any]:
    """Write the rows of both phases as conversations, each as often as its phase shows it.

    The rows are those that `warm_up` and `adapt` would choose. One pass over the file, shuffled,
    shows the model what the two phases show it one after the other.

    Args:
        general: The warm-up's settings: data, m, epochs or max_steps.
        training: The task's: data, n, epochs, and the share held out for validation.
        out: File to write.
        held_out: File for the task's validation rows; written if there are any.

    Raises:
        SettingsError: If a phase has rows without a prompt, which are not conversations, or the
            length of the warm-up is set in tokens.
    """
    if general.max_tokens is not None:
        raise SettingsError("a warm-up that ends by max_tokens cannot be mixed with a task's rows")
    pool = read_task(general.data, general.task)
    task = read_task(training.data, training.task)
    general_rows = _chosen(pool, general.m, seed_of(general, "subset"))
    task_rows = _chosen(task, training.n, seed_of(training, "subset"))
    shown, valid = split_validation(
        range(len(task_rows)), training.validation_fraction, training.fold
    )
    task_shown = [task_rows[index] for index in shown]
    rows = _repeated(general_rows, passes(len(general_rows), general))
    rows += _repeated(task_shown, passes(len(task_shown), training))
    write_text(out, _lines(rows))
    if valid:
        write_text(held_out, _lines([task_rows[index] for index in valid]))
    return {"n_general_rows": len(general_rows), "n_task_rows": len(shown), "n_rows": len(rows)}


def _chosen(data: TaskData, n: int | None, seed: int) -> list[Example]:
    return [data.examples[index] for index in nested_order(len(data.examples), seed)[:n]]


def _repeated(rows: list[Example], epochs: float) -> list[Example]:
    whole = int(epochs)
    return rows * whole + rows[: round((epochs - whole) * len(rows))]


def _lines(rows: list[Example]) -> str:
    lines: list[str] = []
    for row in rows:
        if not row.prompt:
            raise SettingsError("rows of `text` alone cannot be mixed with those of a task")
        turns = [turn.to_dict() for turn in (*row.prompt, row.answer)]
        tools = {"tools": list(row.tools)} if row.tools else {}
        lines.append(json.dumps({"messages": turns, **tools}, ensure_ascii=False) + "\n")
    return "".join(lines)
