"""The errors of d2lora: one small tree.

    D2LoraError
    ├── SettingsError   (ValueError)    a setting is unknown, out of range or contradicts another
    ├── DataError       (ValueError)    a data file cannot be used; every fault is listed at once
    ├── ModelError      (ValueError)    a base or an adapter cannot be loaded or does not fit
    │   └── WarmStartError              a folder is not a warm start, or not one for this base
    ├── TrainingError   (RuntimeError)  training cannot start or has gone wrong
    └── RunError        (RuntimeError)  a run folder is in use, incomplete or of other settings

A message says what was expected, what was found and what to do. The command line prints the
message alone and ends with exit code 2; a traceback means a bug of ours.
"""

import errno
import os
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class D2LoraError(Exception):
    """Base of every error that a user of d2lora can cause."""


class SettingsError(D2LoraError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(D2LoraError, ValueError):
    """A data file cannot be used."""


class ModelError(D2LoraError, ValueError):
    """A base or an adapter cannot be loaded or does not fit."""


class WarmStartError(ModelError):
    """A folder is not a warm start, or not one for this base or these settings."""


class TrainingError(D2LoraError, RuntimeError):
    """Training cannot start or has gone wrong."""


class RunError(D2LoraError, RuntimeError):
    """A run folder is in use, incomplete or belongs to other settings."""


_OF_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def disk_errors() -> tuple[type[Exception], ...]:
    """Return what is raised where a disk fails: by Python, and by the libraries that write."""
    kinds: list[type[Exception]] = [OSError]
    if library := sys.modules.get("safetensors"):
        kinds.append(library.SafetensorError)
    return tuple(kinds)


def system_error(error: BaseException) -> int | None:
    """Return the system's number of an error, be it in the words of a library in Rust."""
    if (number := getattr(error, "errno", None)) is not None:
        return number
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def disk_fault(error: BaseException) -> str | None:
    """Return what to tell a user whose disk is full or fails; None for other errors."""
    number, name = system_error(error), getattr(error, "filename", None)
    if number not in _OF_DISK:
        return None
    what = "a file cannot be written" if name is None else f"{name} cannot be written"
    return (
        f"{what}: {os.strerror(number).lower()}. Nothing that was finished is lost: once that is "
        "mended, the same command goes on, a training with --resume"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]"
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean `x`?" for the nearest known name, or an empty string."""
    nearest = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{nearest[0]}`?" if nearest else ""


def printable(text: str) -> str:
    r"""Return a text for a terminal: line ends and tabs stay, other controls are shown as `\x1b`.

    What would move the cursor, name the window, or turn the direction of what follows is then a
    text like any other.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def counted(n: int, thing: str) -> str:
    """Return how many things there are, as in `1 row` and `1,250 rows`."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def listed(faults: Sequence[str], *, shown: int = 20) -> str:
    """Join faults one a line, saying how many are left out beyond the first `shown`."""
    lines = [f"  - {fault}" for fault in faults[:shown]]
    if len(faults) > shown:
        lines.append(f"  - ... and {len(faults) - shown} more")
    return "\n".join(lines)
