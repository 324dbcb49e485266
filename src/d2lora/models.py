"""The base: a frozen causal language model with its tokenizer, known by a fingerprint.

Weights come from safetensors only and no code of a model repository is ever run.
"""

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from d2lora.adapter_files import ADAPTER_CONFIG
from d2lora.errors import ModelError
from d2lora.fingerprints import fingerprint_of
from d2lora.settings import BaseSettings

EMBEDDED = "embedded"
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Base:
    """A base model, ready to compute."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    fingerprint: str

    @property
    def eos_id(self) -> int:
        """The token that ends a completion."""
        return _token_id(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """A token for padding that is not EOS, so that EOS stays supervised (trl#1623)."""
        tokenizer = self.tokenizer
        for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
            if candidate is not None and candidate != self.eos_id:
                return _token_id(candidate)
        return 0 if self.eos_id != 0 else 1


def _token_id(value: object) -> int:
    assert isinstance(value, int)
    return value


def load_base(settings: BaseSettings) -> Base:
    """Load the base that the settings name, in evaluation mode and frozen.

    Raises:
        ModelError: If it cannot be found, is not a causal language model, has no safetensors or
            no EOS token, or the device is not there.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = device_of(settings.device)
    folder = base_folder(settings.base, settings.revision)
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would load the base that is named there, wherever that is.
        raise ModelError(
            f"{settings.base}: it holds an adapter ({ADAPTER_CONFIG}) and is no base; give --base "
            "the model that the adapter was made on, or take that file out"
        )
    fingerprint = fingerprint_of(folder)
    tokenizer = load_tokenizer(settings)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype_of(settings.dtype, device), use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{settings.base}: not a causal language model: {reason}") from None
    model.requires_grad_(False)
    nn.Module.to(model, device).eval()
    return Base(model, tokenizer, settings.base, settings.revision, fingerprint)


def load_tokenizer(settings: BaseSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base alone.

    Raises:
        ModelError: If there is none, or it has no EOS token.
    """
    folder = base_folder(settings.base, settings.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{settings.base}: not a causal language model: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{settings.base}: the tokenizer has no EOS token, so completions could not end; set "
            "`eos_token` in its tokenizer_config.json"
        )
    return tokenizer


def base_folder(name: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """Return the local folder of a base, fetching a hub model's files where needed and allowed.

    Raises:
        ModelError: If there is none.
    """
    if name == EMBEDDED:
        return Path(str(resources.files("d2lora") / "embedded" / "base"))
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: no model folder: it has no config.json")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"{name}: no such folder; a base is `embedded`, a local folder or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(_FILES), local_files_only=not fetch
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name}: no local folder of this name, and the hub gave none: {reason}"
        ) from None


def fingerprint_of_model(model: PreTrainedModel) -> str | None:
    """Return the fingerprint of the files that a model was loaded from; None where unknown."""
    folder = Path(str(model.config.name_or_path))
    return fingerprint_of(folder) if (folder / "config.json").is_file() else None


def device_of(name: str) -> torch.device:
    """Return the device named; `auto` is CUDA, then MPS, then the CPU.

    With several processes on one machine each takes the CUDA device of its local rank.

    Raises:
        ModelError: If it is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return device_of("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
    n_cuda = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= n_cuda:
        raise ModelError(f"--device {name}: torch sees {n_cuda} CUDA device(s); use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("--device mps: torch sees no MPS device; use --device cpu")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the number format named; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def weight_of(layer: nn.Module) -> Any:
    """Return the one matrix that a linear layer multiplies with; None where there is none.

    An adapter has to be merged.
    """
    if isinstance(layer, LoraLayer):
        return weight_of(layer.get_base_layer()) if layer.merged else None
    return layer.weight if type(layer) is nn.Linear else None


def is_plain(model: nn.Module) -> bool:
    """Say whether a model computes with plain weights alone: without adapters, or all merged."""
    return all(
        isinstance(module, LoraLayer) and module.merged
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )


def causal_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside a PEFT model, adapters in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner
