"""Outputs of finished cells, to be browsed side by side in the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pyarrow import ArrowInvalid

from d2lora.evaluation.metrics import PREFERENCE
from d2lora.report.findings import Findings

MAX_OUTPUTS = 12_000
"""Outputs in a page, over all cells; each cell shows the same first test rows."""
MAX_CELLS = 2_000
"""Cells whose outputs are in a page."""
MAX_CHARACTERS = 2_000
"""Of a text; a longer one is cut, and says so."""


@dataclass(frozen=True)
class Examples:
    """What the page's browser of outputs reads, and notes on what was left out."""

    data: dict[str, Any]
    """Texts once each, and per task its rows and cells as indices of texts."""
    notes: list[str]
    """Sentences on what is not shown."""


def read_examples(findings: Findings) -> Examples:
    """Read the records of every cell that answered from the study's store."""
    cells = [c for c in findings.cells if findings.score_of[c["task"]] not in PREFERENCE]
    n_cells, cells = len(cells), _of_first_seeds(cells)
    found = [(cell, _records(findings, cell)) for cell in cells]
    there = [(cell, records) for cell, records in found if records is not None]
    texts = _Texts()
    tasks: dict[str, Any] = {}
    notes: list[str] = []
    most = max(1, MAX_OUTPUTS // max(1, len(there)))
    for cell, records in there:
        score = findings.score_of[cell["task"]]
        shown = records.head(most)
        task = tasks.setdefault(cell["task"], _task(findings, cell["task"], shown, texts))
        if len(shown) < len(records):
            note = f"{task['title']}: the first {len(shown)} of {len(records)} test rows are shown."
            notes += [] if note in notes else [note]
        values = [float(value) for value in shown[score]]
        task["graded"] = task["graded"] or any(value not in (0.0, 1.0) for value in values)
        task["cells"].append(
            {
                "arm": cell["arm"],
                "n": cell["n"],
                "seed": cell["seed"],
                "outputs": [texts.index(text) for text in shown["output"]],
                "scores": [round(value, 4) for value in values],
            }
        )
    if len(cells) < n_cells:
        notes.append(f"Of {n_cells:,} cells the {len(cells):,} of the first seeds are shown.")
    if len(there) < len(cells):
        notes.append(
            f"The outputs of {len(cells) - len(there)} of {len(cells)} cells are "
            f"not in the study's store; run d2lora study again to restore them."
        )
    if texts.n_cut:
        notes.append(f"{texts.n_cut} texts are cut off after {MAX_CHARACTERS:,} characters.")
    sizes = list(findings.plan.sizes)
    arms = [arm.name for arm in findings.plan.arms]
    data = {"texts": texts.all, "tasks": tasks, "sizes": sizes, "arms": arms}
    return Examples(data, notes)


def _of_first_seeds(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells that a page has room for: those of the first seeds, in their order."""
    seeds = sorted(cell["seed"] for cell in cells)
    last = seeds[min(len(seeds), MAX_CELLS) - 1] if seeds else 0
    return [cell for cell in cells if cell["seed"] <= last][:MAX_CELLS]


def _records(findings: Findings, cell: Mapping[str, Any]) -> pd.DataFrame | None:
    """Return a cell's records; None where the store has none, or a file that was cut off."""
    path = findings.store / str(cell.get("key")) / "records.parquet"
    columns = ["prompt", "target", "output", findings.score_of[cell["task"]]]
    try:
        return pd.read_parquet(path, columns=columns)
    except (FileNotFoundError, ArrowInvalid):
        return None


class _Texts:
    """Every text once; arms often answer alike."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.n_cut = 0
        self._places: dict[str, int] = {}

    def index(self, text: str) -> int:
        if text not in self._places:
            cut = len(text) > MAX_CHARACTERS
            self.n_cut += cut
            self._places[text] = len(self.all)
            self.all.append(f"{text[:MAX_CHARACTERS]} […]" if cut else text)
        return self._places[text]


def _task(findings: Findings, task: str, records: pd.DataFrame, texts: _Texts) -> dict[str, Any]:
    return {
        "title": findings.title(task),
        "score": findings.score_name(task),
        "graded": False,
        "prompts": [texts.index(text) for text in records["prompt"]],
        "targets": [texts.index(text) for text in records["target"]],
        "cells": [],
    }
