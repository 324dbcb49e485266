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
        MemoryError, RuntimeError: If there is not enough memory.
    """
    try:
        return check()
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        return False


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that memory ran out: of a GPU, or of the machine.

    torch's allocator of a CPU's memory raises a plain RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
