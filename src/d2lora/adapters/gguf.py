"""Bases in GGUF: converted once into the cache, then loaded like any other.

transformers reads the file (its list of architectures is
https://huggingface.co/docs/transformers/gguf); what is kept are plain bfloat16 safetensors.
"""

import glob
from pathlib import Path
from typing import Any

from filelock import FileLock

from d2lora.adapters.foreign import save_tokenizer
from d2lora.adapters.gguf_header import GgufHeader, read_header
from d2lora.errors import ModelError, first_line
from d2lora.runtime.claims import clear_leftovers
from d2lora.runtime.extras import need_extra
from d2lora.runtime.run_folder import cache_folder, new_folder, read_json, write_json

RECORD = "gguf.json"
"""What a converted folder says of its origin."""


def converted_gguf(path: Path) -> Path:
    """Return the folder of a GGUF file's weights as safetensors; converted where it is not yet.

    The folder is known by the file's fingerprint, so a file that changes is converted again.
    Weights are kept in bfloat16, whatever they are loaded as later.

    Raises:
        ModelError: If the file is damaged or transformers cannot read the architecture.
        SettingsError: If gguf is not installed.
    """
    need_extra("gguf", f"{path}, a GGUF file,")
    header = read_header(path)
    folder = cache_folder() / "bases" / f"{path.stem}-{header.fingerprint[:16]}"
    if (folder / RECORD).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / RECORD).is_file():
            clear_leftovers(folder.parent, glob.escape(folder.name))
            with new_folder(folder) as unfinished:
                _convert(path, header, unfinished)
    return folder


def quantization_of(folder: Path) -> str | None:
    """Return how a converted base's weights were quantized; None for any other folder."""
    record = folder / RECORD
    return read_json(record)["quantization"] if record.is_file() else None


def _convert(path: Path, header: GgufHeader, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {
        "gguf_file": path.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            **place,
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise ModelError(
            f"{path}: transformers cannot read this GGUF file (architecture "
            f"`{header.architecture}`): {reason}; give --base the same model as safetensors"
        ) from None
    # What is saved is an ordinary model, so nothing of the file's packing is left in it.
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    origin = {"file": path.name, "fingerprint": header.fingerprint}
    write_json(folder / RECORD, {**origin, "quantization": header.quantization})
