"""Fingerprints of a base's weights, without loading them."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from d2lora.adapters.quantization import saved_quantization
from d2lora.errors import ModelError, counted

_CHUNKS, _CHUNK_BYTES = 16, 4096
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


class Identity(NamedTuple):
    """What says whether two bases are the same."""

    fingerprint: str
    """Of all weights, `fingerprint_of`."""
    unquantized: str
    """Of the norms and some rows of the embedding, which are the same where a model is quantized;
    empty: there are none, or they are not known."""
    saved_quantized: bool
    """Whether the files hold quantized weights."""

    def is_same(self, other: "Identity") -> bool:
        """Say whether weights are the same, or differ by quantization alone as far as is seen."""
        if self.fingerprint == other.fingerprint:
            return True
        either = self.saved_quantized or other.saved_quantized
        return either and self.unquantized == other.unquantized != ""


def identity_of(folder: Path) -> Identity:
    """Return what a model folder's weights are known by.

    Raises:
        ModelError: As `fingerprint_of`.
    """
    fingerprint = fingerprint_of(folder)
    quantized = saved_quantization(folder) is not None
    return Identity(fingerprint, _unquantized(folder), quantized)


def _unquantized(folder: Path) -> str:
    """Return a fingerprint of what quantization leaves alone, whatever its dtype."""
    parts: list[str] = []
    for file in _loaded_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                values = tensors.get_slice(name)
                shape = values.get_shape()
                if name.endswith(_EMBEDDINGS) and len(shape) == 2:
                    some = [values[row : row + 1] for row in range(0, shape[0], shape[0] // 4 or 1)]
                elif name.endswith(".weight") and len(shape) == 1:
                    some = [values[:]]
                else:
                    continue
                digest = hashlib.sha256()
                for part in some:
                    digest.update(part.float().numpy().tobytes())
                parts.append(f"{name} {shape} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest() if parts else ""


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
        files = sorted(folder.glob("*.safetensors"))
        if odd := [file for file in files if not file.is_file()]:
            raise ModelError(f"{odd[0]}: not a file, or a link to nothing")
        return files
    try:
        shards = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{index}: {unreadable(index, 'not an index of weights')}") from None
    outside = sorted(n for n in shards if Path(n).is_absolute() or ".." in Path(n).parts)
    if outside:
        raise ModelError(f"{index}: it names a file outside of the folder: {outside[0]!r:.200}")
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
    except (SafetensorError, OSError):
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
