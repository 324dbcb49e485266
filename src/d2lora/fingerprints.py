"""Knowing a base again by its weights, without loading them."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2lora.errors import ModelError

_CHUNKS, _CHUNK_BYTES = 16, 4096


def fingerprint_of(folder: Path) -> str:
    """Return a fingerprint of a model's weights, whatever its sharding.

    It covers every tensor's name, type and shape and up to 16 evenly spaced pieces of 4 KiB of
    its bytes: full-model training or a merge changes it, and a base of 8 B parameters takes
    well under a second.

    Raises:
        ModelError: If there are no safetensors files, or one is cut off.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: no *.safetensors; d2lora loads no pickled weights. Convert them with "
            "`model.save_pretrained(folder)`"
        )
    pieces = sorted(piece for file in files for piece in _tensor_digests(file))
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()


def _tensor_digests(file: Path) -> Iterator[str]:
    with file.open("rb") as handle:
        try:
            (header_length,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(header_length))
        except (struct.error, ValueError, MemoryError, OverflowError):
            raise ModelError(f"{file}: not a safetensors file, or cut off") from None
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(f"{name} {entry['dtype']} {entry['shape']}".encode())
            stride = max(_CHUNK_BYTES, (end - begin) // _CHUNKS)
            for offset in range(begin, end, stride):
                handle.seek(8 + header_length + offset)
                digest.update(handle.read(min(_CHUNK_BYTES, end - offset)))
            yield f"{name} {digest.hexdigest()}"
