"""A GGUF file's header, read with every length checked against the file's own.

Files come from strangers: a count or a length that the file cannot hold is an error before anything
is built from it, so reading ends within the file's size whatever it says.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import math
import struct
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from d2lora.errors import ModelError
from d2lora.runtime.run_folder import Stamp, stamp_of

_MAGIC = b"GGUF"
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8
_PIECES, _PIECE_BYTES = 16, 4096


@dataclass(frozen=True)
class GgufHeader:
    """What is known of a GGUF file without its weights."""

    architecture: str
    quantization: str
    """Types of its weights by share of numbers, such as `Q4_1 (100 %)`."""
    fingerprint: str
    """SHA-256 over the header and up to 16 spaced pieces of each tensor's bytes."""


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        ModelError: If it is not a GGUF file, of a version that is not known, cut off, or says what
            cannot be.
    """
    return _header_of(stamp_of(path))


@lru_cache(maxsize=16)
def _header_of(stamp: Stamp) -> GgufHeader:
    """Read a file once for as long as it stays what it is: a study asks for every run."""
    path = Path(stamp[0])
    with path.open("rb") as file:
        return _Reader(file, path).header()


class _Reader:
    """Reads numbers and texts, never beyond the file's end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = path.stat().st_size

    def header(self) -> GgufHeader:
        if self._file.read(4) != _MAGIC:
            raise ModelError(f"{self._path}: not a GGUF file: it does not start with `GGUF`")
        version = self._number("<I")
        if version not in (2, 3):
            raise ModelError(
                f"{self._path}: expected GGUF version 2 or 3, found {version}; a file of another "
                "byte order or an older one has to be converted again"
            )
        n_tensors, n_values = self._number("<Q"), self._number("<Q")
        # A tensor's entry takes 24 bytes and more, a value's 13.
        self._check(24 * n_tensors + 13 * n_values, f"{n_tensors} tensors and {n_values} values")
        architecture, alignment = "", 32
        for _ in range(n_values):
            name = self._text()
            kind = self._number("<I")
            if name == "general.architecture" and kind == _STRING:
                architecture = self._text()
            elif name == "general.alignment" and kind == 4:
                alignment = self._number("<I")
            else:
                self._skip(kind, depth=0)
        if not architecture:
            raise ModelError(f"{self._path}: it has no `general.architecture`")
        if alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{self._path}: alignment must be a power of two, found {alignment}")
        tensors = [self._tensor() for _ in range(n_tensors)]
        data_begin = -(-self._file.tell() // alignment) * alignment
        return GgufHeader(
            architecture, _quantization(tensors), self._fingerprint(tensors, data_begin)
        )

    def _tensor(self) -> "_Tensor":
        name = self._text()
        n_dimensions = self._number("<I")
        if not 0 < n_dimensions <= _MOST_DIMENSIONS:
            raise ModelError(f"{self._path}: tensor {name!r:.80} has {n_dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(n_dimensions))
        kind, offset = self._number("<I"), self._number("<Q")
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in list(GGMLQuantizationType):
            raise ModelError(f"{self._path}: tensor {name!r:.80} is of an unknown type, {kind}")
        n_block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        n_numbers = math.prod(shape)
        if n_numbers % n_block:
            raise ModelError(f"{self._path}: tensor {name!r:.80} does not fill its blocks")
        return _Tensor(
            name, GGMLQuantizationType(kind).name, shape, offset, n_numbers // n_block * n_bytes
        )

    def _fingerprint(self, tensors: list["_Tensor"], data_begin: int) -> str:
        end = self._file.tell()
        self._file.seek(0)
        digest = hashlib.sha256(self._file.read(end))
        for tensor in tensors:
            begin = data_begin + tensor.offset
            if begin + tensor.n_bytes > self._size:
                raise ModelError(
                    f"{self._path}: cut off: tensor {tensor.name!r:.80} should end at byte "
                    f"{begin + tensor.n_bytes:,}, the file has {self._size:,}; download it again"
                )
            for offset in range(0, tensor.n_bytes, max(_PIECE_BYTES, tensor.n_bytes // _PIECES)):
                self._file.seek(begin + offset)
                digest.update(self._file.read(min(_PIECE_BYTES, tensor.n_bytes - offset)))
        return digest.hexdigest()

    def _number(self, layout: str) -> int:
        raw = self._file.read(struct.calcsize(layout))
        if len(raw) < struct.calcsize(layout):
            raise ModelError(f"{self._path}: cut off inside its header; download it again")
        return struct.unpack(layout, raw)[0]

    def _text(self) -> str:
        length = self._number("<Q")
        self._check(length, f"a text of {length} bytes")
        return self._file.read(length).decode("utf-8", errors="replace")

    def _skip(self, kind: int, depth: int) -> None:
        if kind in _WIDTHS:
            self._leap(_WIDTHS[kind], 1)
        elif kind == _STRING:
            self._leap(1, self._number("<Q"))
        elif kind == _ARRAY and depth < 4:
            inner, n = self._number("<I"), self._number("<Q")
            if inner in _WIDTHS:
                self._leap(_WIDTHS[inner], n)
                return
            self._check(8 * n, f"a list of {n} values")
            for _ in range(n):
                self._skip(inner, depth + 1)
        else:
            raise ModelError(f"{self._path}: a value of the unknown type {kind}")

    def _leap(self, width: int, n: int) -> None:
        self._check(width * n, f"a value of {width * n} bytes")
        self._file.seek(width * n, 1)

    def _check(self, n_bytes: int, what: str) -> None:
        if n_bytes > self._size - self._file.tell():
            raise ModelError(
                f"{self._path}: its header announces {what}, which the file cannot hold: it is cut "
                "off or damaged; download it again"
            )


@dataclass(frozen=True)
class _Tensor:
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def _quantization(tensors: list[_Tensor]) -> str:
    """Return the types of the weights with their shares, the largest first."""
    numbers: Counter[str] = Counter()
    for tensor in tensors:
        numbers[tensor.kind] += math.prod(tensor.shape)
    whole = max(1, numbers.total())
    shares = [(kind, n / whole) for kind, n in numbers.most_common()]
    return ", ".join(f"{kind} ({share:.1%})" for kind, share in shares)
