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


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean `x`?" for the nearest known name, or an empty string."""
    nearest = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{nearest[0]}`?" if nearest else ""


def counted(n: int, thing: str) -> str:
    """Return how many things there are, as in `1 row` and `1,250 rows`."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def listed(faults: Sequence[str], *, shown: int = 20) -> str:
    """Join faults one a line, saying how many are left out beyond the first `shown`."""
    lines = [f"  - {fault}" for fault in faults[:shown]]
    if len(faults) > shown:
        lines.append(f"  - ... and {len(faults) - shown} more")
    return "\n".join(lines)
