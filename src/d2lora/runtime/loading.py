"""Heavy libraries loaded and left without a search for garbage."""

import atexit
import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def loading() -> Generator[None]:
    """Collect no garbage while a block imports, nor at the end of the process.

    torch, transformers and PEFT make hundreds of thousands of objects that stay. Going through them
    again and again takes a second while they load, and longer than that when Python ends.
    """
    was_on = gc.isenabled()
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        if was_on:
            gc.enable()
