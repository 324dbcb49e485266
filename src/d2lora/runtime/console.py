"""What the user sees while a command runs: messages and a progress bar, or nothing."""

import logging
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from d2lora.errors import printable
from d2lora.runtime.claims import is_main_process

WIDTH = 110
"""Columns of a table where there is no terminal to ask."""


def quiet_libraries() -> None:
    """Leave the terminal to our own messages; for the start of a process of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT asks transformers for a property that transformers renamed; nothing a user can do.
    # bitsandbytes, where it is installed, misses a faster product that is not needed here.
    # Of LLM.int8 it says at every product that inputs are rounded to float16.
    for name in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)


class _Plain(RenderHook):
    """Shows control characters of data as texts, so that they cannot command the terminal."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Wrap what is to be shown."""
        return [_Printable(one) for one in renderables]


class _Printable:
    def __init__(self, shown: ConsoleRenderable) -> None:
        self._shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self._shown, options):
            yield part if part.control else Segment(printable(part.text), part.style)


def plain_console(**given: Any) -> Console:
    """Return a console on which texts are shown as they are: no markup, no emoji, no controls.

    Args:
        given: Of rich's console.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, **given)
    console.push_render_hook(_Plain())
    return console


def table_console() -> Console:
    """Return a console on standard output, wide enough for tables in a file or a pipe."""
    wide = plain_console()
    return wide if wide.is_terminal else plain_console(width=WIDTH)


class Bar:
    """A running progress bar; `update` moves it on and shows a note such as the loss."""

    def __init__(self, progress: Progress | None, task_id: int = 0) -> None:
        """Wrap a rich progress; None shows nothing."""
        self._progress, self._task_id = progress, task_id

    def update(self, completed: int, note: str = "") -> None:
        """Set how much is done."""
        if self._progress is not None:
            task = self._progress.task_ids[self._task_id]
            self._progress.update(task, completed=completed, note=note)


class Reporter:
    """Writes messages to standard error, so that standard output holds results alone."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Make a reporter; a quiet one, or one beside the main process, says nothing."""
        quiet = quiet or not is_main_process()
        self._console = plain_console(file=sys.stderr, quiet=quiet)
        self._quiet = quiet

    def say(self, text: str) -> None:
        """Print one line of plain text."""
        self._console.print(text, markup=False)

    @contextmanager
    def bar(self, description: str, total: int, completed: int = 0) -> Generator[Bar]:
        """Show a progress bar inside the block."""
        if self._quiet or not self._console.is_terminal:
            yield Bar(None)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self._console) as progress:
            progress.add_task(description, total=total, completed=completed, note="")
            yield Bar(progress)
