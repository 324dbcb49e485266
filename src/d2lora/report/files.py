"""Findings as files for other tools: tables, and a summary in Markdown."""

import math
from typing import Any

import numpy as np
import pandas as pd

from d2lora.errors import counted
from d2lora.report import words
from d2lora.report.findings import Findings
from d2lora.report.summary import cost_grid, pooled_grid, task_grid
from d2lora.runtime.grids import inline, markdown
from d2lora.study.cells import BASE
from d2lora.study.decontamination import contamination_lines

_OF_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")


def cell_table(findings: Findings) -> pd.DataFrame:
    """Return one row a cell: mean scores (0 to 1), forgetting, learning rate, cost, key.

    `general_loss` is in nats per token; `choices_accuracy` is a share; costs have their units in
    their names, under `cost_`.
    """
    bases = {cell["task"]: cell for cell in findings.cells if cell["arm"] == BASE}
    rows: list[dict[str, Any]] = []
    for cell in findings.cells:
        right, loss = cell["choices_right"], cell["general_loss"]
        reference = bases.get(cell["task"], {}).get("general_loss")
        rows.append(
            {
                **{name: cell[name] for name in ("task", "arm", "kind", "n", "seed")},
                **{name: sum(values) / len(values) for name, values in cell["scores"].items()},
                "n_items": len(next(iter(cell["scores"].values()))),
                "general_loss": loss,
                "general_loss_change": None if None in (loss, reference) else loss - reference,
                "choices_accuracy": None if right is None else sum(right) / len(right),
                "learning_rate": cell["learning_rate"],
                "validation_loss_before": cell.get("validation_loss_before"),
                "validation_loss_after": cell.get("validation_loss_after"),
                "n_output_tokens": cell["n_output_tokens"],
                "evaluation_s": cell["evaluation_s"],
                **{f"cost_{name}": value for name, value in cell.get("cost", {}).items()},
                "key": cell.get("key"),
            }
        )
    return pd.DataFrame(rows)


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV in which no spreadsheet takes a text for a formula.

    Such a text (`=1+1`, `@x`) gets an apostrophe before it, as a spreadsheet's user would type it.
    """

    def shown(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(_OF_FORMULAS) else value

    return table.map(shown).rename(columns=shown).to_csv(index=False)


def item_table(findings: Findings) -> pd.DataFrame:
    """Return one row a cell and test row, with every score (0 to 1), for your own statistics.

    Prompts and outputs stay in the store, in `KEY/records.parquet`.
    """
    n_rows = [len(next(iter(cell["scores"].values()))) for cell in findings.cells]
    columns: dict[str, Any] = {
        name: np.repeat(np.array([cell[name] for cell in findings.cells]), n_rows)
        for name in ("task", "arm", "n", "seed")
    }
    columns["row"] = np.concatenate([np.arange(n) for n in n_rows])
    names = dict.fromkeys(name for cell in findings.cells for name in cell["scores"])
    for name in names:
        own = [
            cell["scores"].get(name, [math.nan] * n)
            for cell, n in zip(findings.cells, n_rows, strict=True)
        ]
        columns[name] = np.concatenate(own)
    return pd.DataFrame(columns)


def summary_text(findings: Findings) -> str:
    """Return findings, cautions, tables and provenance as Markdown."""
    plan, made = findings.plan, findings.provenance
    verdicts = words.task_verdicts(findings)
    contamination = contamination_lines(findings.contamination)
    lines = [
        f"# {inline(plan.question or findings.path.resolve().name)}",
        "",
        *(f"{inline(sentence)}\n" for sentence in words.headline(findings)),
        *(f"- {inline(sentence)}" for sentence in findings.verdicts()),
        "",
        *(f"- {inline(verdict.title)}: {verdict.power}" for verdict in verdicts),
        *(f"- {inline(caution)}" for caution in words.cautions(findings)),
        *(f"- Contamination: {inline(line)}." for line in contamination),
        "",
    ]
    grids = [task_grid(findings, task) for task in plan.tasks]
    tables = [
        markdown(grid) for grid in (*grids, pooled_grid(findings), cost_grid(findings)) if grid.rows
    ]
    failed = [
        f"- failed: {inline(cell)}: {inline(reason)}" for cell, reason in findings.failures.items()
    ]
    versions = ", ".join(f"{k} {v}" for k, v in made.get("versions", {}).items())
    end = f"{counted(plan.seeds, 'seed')}, base {plan.base}, {made.get('date')}, {versions}."
    return "\n".join([*lines, *tables, *failed, inline(end), ""])
