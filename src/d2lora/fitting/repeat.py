"""The commands that make the same adapter as a fit did."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2lora.fitting.found import Fitted
from d2lora.settings import Settings
from d2lora.study.averages import averaging, interpolating

_UNSEEN = {"quiet", "measure_start"}
"""Settings of a run in the store that change nothing of the adapter."""


def commands_of(found: Fitted, out: Path) -> str:
    """Return shell commands, one a line: the final runs, and what is made of them."""
    many, between = len(found.runs) > 1, found.share < 1
    last = out.with_name(f"{out.name}-again")
    end = out.with_name(f"{out.name}-end") if between else last
    paths = (
        [out.with_name(f"{out.name}-run-{i}") for i in range(len(found.runs))] if many else [end]
    )
    lines = [
        command_line("adapt", run.changed(out=path))
        for run, path in zip(found.runs, paths, strict=True)
    ]
    if many:
        lines.append(command_line("convert", averaging(paths, end)))
    if between:
        asked = interpolating(found.runs[0].init, end, found.share, last)
        lines.append(command_line("convert", asked))
    return "".join(f"{line}\n" for line in lines)


def command_line(name: str, settings: Settings) -> str:
    """Return a command with the settings that are not defaults."""
    values: Mapping[str, Any] = settings.model_dump(mode="json", exclude_defaults=True)
    words = ["d2lora", name]
    for key, value in values.items():
        if key in _UNSEEN or value is None:
            continue
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [f"--{option}", *map(_text, value)]
        else:
            words += [f"--{option}", _text(value)]
    return shlex.join(words)


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
