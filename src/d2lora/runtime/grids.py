"""A table as text, for the terminal or as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

NONE = "–"
"""Stands where there is no number."""
_LEFT = {"arm", "task", "what"}


@dataclass(frozen=True)
class Grid:
    """A table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def as_table(grid: Grid) -> Table:
    """Return a grid for the terminal."""
    table = Table(title=grid.title)
    for column in grid.columns:
        table.add_column(column, justify="left" if column in _LEFT else "right")
    for row in grid.rows:
        table.add_row(*row)
    return table


def markdown(grid: Grid) -> str:
    """Return a grid as a Markdown table with its title, for a pull request or a paper."""
    lines = [f"**{grid.title}**", "", _line(grid.columns), _line(["---"] * len(grid.columns))]
    return "\n".join([*lines, *(_line(row) for row in grid.rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
