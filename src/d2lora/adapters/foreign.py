"""Files of others: what libraries raise on them, and what in them would exhaust this machine."""

import base64
import json
import os
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2lora.errors import D2LoraError, ModelError, disk_fault, first_line, system_error

_MOST_GROWTH = 1000
"""Characters that a tokenizer may make of one."""
_MOST_LAYERS = 10_000
"""Layers of a model; each takes a millisecond to build, whatever its size."""
OF_PASSES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What a pass of a model that does not fit its configuration may raise."""


@contextmanager
def foreign(what: str) -> Generator[None]:
    """Turn what a library raises on a file into an error that names it.

    Raises:
        ModelError: For any error but those of a disk or of memory; of a damaged file a library may
            raise all.
    """
    try:
        yield
    except D2LoraError:
        raise
    except BaseException as error:  # tokenizers raises nothing more special
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if disk_fault(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise ModelError(f"{what}: {first_line(error)}") from None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of transformers.

    Raises:
        OSError: If the disk is full or fails, for which tokenizers raises a plain `Exception`.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # what is not of the system is raised as it is
        if (number := system_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from None


def is_panic(error: BaseException) -> bool:
    """Say whether a library in Rust gave up; its error has no public name."""
    return type(error).__name__ == "PanicException"


def check_config(folder: Path) -> None:
    """Check that a model's configuration is an object, and does not ask for endless layers.

    Raises:
        ModelError: If not.
    """
    path = folder / "config.json"
    with foreign(f"{path}: not a configuration"):
        values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object, found {type(values).__name__}")
    for name, value in values.items():
        many = "layer" in name and isinstance(value, int | float) and value > _MOST_LAYERS
        if many or (name == "num_hidden_layers" and isinstance(value, int) and value < 1):
            raise ModelError(
                f"{path}: `{name}` must be from 1 to {_MOST_LAYERS:,}, found {value!r:.60}"
            )


def check_growth(tokenizer: Any, name: str) -> None:
    """Check that a tokenizer makes no endless text of a short one.

    Args:
        tokenizer: Its Rust core, a `tokenizers.Tokenizer`.
        name: Its base.

    Raises:
        ModelError: If it does.
    """
    parts: dict[str, Any] = {"normalizer": tokenizer.normalizer, "decoder": tokenizer.decoder}
    for what, part in parts.items():
        # As they are pickled, which is JSON; that of the whole would hold the vocabulary, too.
        if part is not None and (growth := _growth(json.loads(part.__getstate__()))) > _MOST_GROWTH:
            raise ModelError(
                f"{name}: the {what} of its tokenizer.json may make {growth:.3g} characters of "
                f"one; at most {_MOST_GROWTH:,} are allowed"
            )


def _growth(part: Mapping[str, Any]) -> float:
    """Return how many characters a normalizer or decoder may make of one."""
    match part["type"]:
        case "Sequence":
            growth = 1.0
            for inner in part.get("normalizers") or part.get("decoders") or ():
                growth *= _growth(inner)
            return growth
        case "Replace":
            pattern, content = part["pattern"], part["content"]
            # Of a pattern it is not known how little it takes; the empty one takes nothing.
            taken = len(pattern.get("String", ""))
            return max(1.0, len(content) / taken if taken else 1 + len(content))
        case "Prepend":
            return 1 + len(part["prepend"])
        case "Precompiled":
            return _longest(base64.b64decode(part["precompiled_charsmap"] or ""))
        case _:
            return 1


def _longest(charsmap: bytes) -> int:
    """Return the length of the longest text in a map of characters, as sentencepiece writes it."""
    if len(charsmap) < 4:
        return 1
    (n_trie,) = struct.unpack("<I", charsmap[:4])
    return max(map(len, charsmap[4 + n_trie :].split(b"\0")))
