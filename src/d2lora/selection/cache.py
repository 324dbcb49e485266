"""Features of rows, computed in blocks and kept on disk by fingerprint.

A block is known by what it was computed with and from, so a killed run goes on where it stopped,
and a pool that only grew at its end costs only the new rows. Files are `.npy` without pickle,
each renamed into place when whole.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2lora.data.rows import Example
from d2lora.runtime.console import Reporter

Array = NDArray[np.float32]
BLOCK_ROWS = 256


class FeatureCache:
    """A folder of computed blocks."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        """Open a folder; it is made when the first block is written."""
        self._folder = folder / "features"
        self._reporter = reporter

    def rows(
        self,
        what: str,
        fingerprint: str,
        examples: Sequence[Example],
        width: int,
        compute: Callable[[Sequence[Example]], Array],
    ) -> Array:
        """Return a feature row of each example, shape (examples, width).

        Args:
            what: Name of the feature, for the progress bar.
            fingerprint: Everything but the examples that the features depend on.
            examples: The rows.
            width: Numbers of each row.
            compute: Gives the features of a block of examples, shape (block, width).
        """
        features = np.empty((len(examples), width), dtype=np.float32)
        with self._reporter.bar(what, len(examples)) as bar:
            for begin in range(0, len(examples), BLOCK_ROWS):
                block = examples[begin : begin + BLOCK_ROWS]
                path = self._folder / f"{block_key(fingerprint, block)}.npy"
                if path.is_file():
                    values: Array = np.load(path, allow_pickle=False)
                else:
                    values = compute(block).astype(np.float32)
                    _write(path, values)
                features[begin : begin + len(block)] = values
                bar.update(begin + len(block))
        return features


def unit_rows(rows: Array) -> Array:
    """Scale each row to length 1; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def block_key(fingerprint: str, examples: Sequence[Example]) -> str:
    """Return the SHA-256 of what a block was computed with and from."""
    digest = hashlib.sha256(fingerprint.encode())
    for example in examples:
        turns = [(turn.role, turn.content, *turn.more.items()) for turn in example.prompt]
        digest.update(repr((turns, example.completion)).encode())
        if example.more or example.tools:
            digest.update(repr((example.more, example.tools)).encode())
    return digest.hexdigest()


def _write(path: Path, values: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(descriptor, "wb") as file:
        np.save(file, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
