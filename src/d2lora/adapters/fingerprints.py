"""Fingerprints of a base's weights, without loading them."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from d2lora.errors import ModelError, counted

_CHUNKS, _CHUNK_BYTES = 16, 4096


def fingerprint_of(folder: Path) -> str:
    """Return a fingerprint of a model's weights, whatever its sharding.

    It covers every tensor's name, type and shape and up to 16 evenly spaced pieces of 4 KiB of
    its bytes: full-model training or a merge changes it, and a base of 8 B parameters takes
    well under a second.

    Files that transformers does not load (copies in other formats, such as
    `consolidated.safetensors`) do not count.

    Raises:
        ModelError: If there are no safetensors files, or one is missing or cut off.
    """
    files = _loaded_files(folder)
    if not files:
        raise ModelError(
            f"{folder}: no *.safetensors; d2lora loads no pickled weights. Convert them with "
            "`model.save_pretrained(folder)`"
        )
    pieces = sorted(piece for file in files for piece in _tensor_digests(file))
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()


def _loaded_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers takes: one, or the shards of its index."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        shards = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index}: {unreadable(index, 'not an index of weights')}") from None
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"{folder}: {counted(len(missing), 'file')} of weights missing: {missing[0]}, ..."
        )
    return [folder / name for name in sorted(shards)]


def unreadable(path: Path, otherwise: str) -> str:
    """Return why a file cannot be read: it is a Git LFS pointer, else the given reason."""
    with path.open("rb") as file:
        pointer = file.read(64).startswith(b"version https://git-lfs")
    fetch = "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    return fetch if pointer else otherwise


def _tensor_digests(file: Path) -> Iterator[str]:
    try:
        with safe_open(file, "np"):  # checks the header and the length
            pass
    except SafetensorError:
        why = unreadable(file, "not a safetensors file, or cut off")
        raise ModelError(f"{file}: {why}") from None
    with file.open("rb") as handle:
        (header_length,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(header_length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(f"{name} {entry['dtype']} {entry['shape']}".encode())
            stride = max(_CHUNK_BYTES, (end - begin) // _CHUNKS)
            for offset in range(begin, end, stride):
                handle.seek(8 + header_length + offset)
                digest.update(handle.read(min(_CHUNK_BYTES, end - offset)))
            yield f"{name} {digest.hexdigest()}"
