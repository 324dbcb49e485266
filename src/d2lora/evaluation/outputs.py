"""From outputs to scores: what a model said, without its thoughts, by the metrics of its task."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from d2lora.data.reading import TaskData
from d2lora.data.rows import Example, Row
from d2lora.data.tasks import Task
from d2lora.evaluation.counts import Column, per_row
from d2lora.evaluation.metrics import Scored, measure_all, metrics_named


def columns_of_outputs(data: TaskData, outputs: Sequence[str]) -> dict[str, Column]:
    """Return the scores of the first rows' outputs by the task's metrics, the main one first.

    Raises:
        D2LoraError: If a metric of the user's own cannot be used, or a target is not what a metric
            compares with.
    """
    scored = [
        scored_output(output, example, row, data.task)
        for output, example, row in zip(outputs, data.examples, data.rows, strict=False)
    ]
    return measure_all(metrics_named(data.task.metrics, data.task.named.folder), scored)


def scored_output(output: str, example: Example, row: Row, task: Task) -> Scored:
    """Return what metrics see of an output and its row, both without thoughts."""
    answers = (example.completion, *example.references)
    said, *right = (without_thoughts(text, task.card.thoughts) for text in (output, *answers))
    return Scored(said, right[0], tuple(right), row.values)


def records_of(
    name: str, examples: Sequence[Example], outputs: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield what is known of each row; all of them have the same fields."""
    with_references = any(example.references for example in examples)
    for index, (example, output) in enumerate(zip(examples, outputs, strict=True)):
        yield {
            "adapter": name,
            "row": index,
            "prompt": example.prompt[-1].content,
            "target": example.completion,
            **({"references": list(example.references)} if with_references else {}),
            **({"choices": list(example.choices)} if example.choices else {}),
            "output": output,
        }


def with_scores(records: list[dict[str, Any]], columns: dict[str, Column]) -> list[dict[str, Any]]:
    """Add its score by every column to each row's record."""
    values = {name: per_row(column).tolist() for name, column in columns.items()}
    return [
        {**record, **{name: own[index] for name, own in values.items()}}
        for index, record in enumerate(records)
    ]


def without_thoughts(output: str, marks: str) -> str:
    """Return an output without what stands between two marks; a thought without end is all of it.

    Where a template has opened the thought itself, the output holds the closing mark alone.
    """
    if not marks:
        return output
    opening, closing = marks.split()
    left = re.sub(f"{re.escape(opening)}.*?{re.escape(closing)}", "", output, flags=re.DOTALL)
    return left.rpartition(closing)[2].partition(opening)[0].strip()
