"""What a model may not be able to compute, tried before it is relied on."""

from collections.abc import Callable

import torch

_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


def succeeds(check: Callable[[], bool]) -> bool:
    """Say whether a check says yes; no where a model cannot compute what it asks for.

    Masks, positions and caches that a model does not know raise anything.

    Raises:
        torch.OutOfMemoryError: If there is not enough memory.
    """
    try:
        return check()
    except torch.OutOfMemoryError:
        raise
    except _FAILURES:
        return False
