"""A table as text, for the terminal or as Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from d2lora.errors import printable

NONE = "–"
"""Stands where there is no number."""
_ENTITIES = {"<": "&lt;", "&": "&amp;"}
_MARKUP = re.compile(
    r"[\\<|`*~\[\]]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|^[#>+]|^-(?= )|(?<=^\d)[.)]"
)
_NOT_IN_CODE = str.maketrans("`|", "'¦")
"""What would end code, or the cell that it stands in."""
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
    lines = [
        f"**{inline(grid.title)}**",
        "",
        _line(grid.columns),
        _line(["---"] * len(grid.columns)),
    ]
    return "\n".join([*lines, *(_line(row) for row in grid.rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(inline, cells)) + " |"


def inline(text: str) -> str:
    """Return a text as a part of a line of Markdown: no markup of its own, no end of the cell."""
    line = " ".join(printable(text).split())
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), line)


def code(text: str) -> str:
    """Return a text as code in a line of Markdown, in which nothing is markup."""
    line = " ".join(printable(text).split()).translate(_NOT_IN_CODE)
    return f"`{line or ' '}`"
